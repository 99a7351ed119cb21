"""A store in an S3 bucket, or in anything that speaks S3 with conditional puts.

``s3://bucket/prefix``; the endpoint, credentials and region are boto3's own (AWS_ENDPOINT_URL,
AWS_PROFILE, …). A put is one request, or a multipart upload that nobody sees before it is complete,
so a reader never meets half an object. A conditional put is S3's ``If-Match`` and ``If-None-Match``.
Some services ignore or refuse these; the first conditional put of a process finds that out (`caveat`),
and from then on the object is read and compared first, which keeps apart the threads of one process
and nobody else who writes in the same moment.

An object that is appended to is a folder of chunks, ``<key>/<offset of its first byte>``: S3 cannot
append, and a reader that asks for what comes after its offset is given just that.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.store.objects import ObjectInfo, ObjectNotFound, PreconditionFailed, StoreError, check_key

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# Parts of a transfer, and how many go at once: eight of 16 MiB fill a 10 Gbit/s line at 100 ms.
_PART_BYTES = 16 * 2**20
_PARTS_AT_ONCE = 8
_OFFSET_DIGITS = 16

_NEXT_STEP = {
    "NoSuchBucket": "there is no such bucket. Create it, or correct NANOCHAT_STORE",
    "AccessDenied": "access denied. The key needs s3:GetObject, s3:PutObject, s3:DeleteObject and "
    "s3:ListBucket on it",
    "InvalidAccessKeyId": "the access key is unknown there. Check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key does not fit the access key. Check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired. Get a new one (aws sso login, …)",
    "RequestTimeTooSkewed": "this machine's clock is off by more than the service allows. Set it (NTP)",
}
# A HEAD has no body, so its error has no name but the status; and what versitygw calls an unknown key.
_ALSO_CALLED = {
    "403": "AccessDenied",
    "404": "NoSuchBucket",
    "RequestExpired": "RequestTimeTooSkewed",
    "TokenRefreshRequired": "ExpiredToken",
    "XAdminUserNotFound": "InvalidAccessKeyId",
}
_NAMELESS = ("400", "403")

# Conditions that a store has been found to keep (None) or not, by endpoint and bucket.
_caveats: dict[tuple[str, str], str | None] = {}
_caveats_lock = threading.Lock()
_read_check_write = threading.Lock()


class S3Store:
    """See the module's text. Safe to use from several threads."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        """Raises ValueError for a prefix that is no key. No request is made."""
        self._bucket = bucket
        self._prefix = f"{check_key(prefix.strip('/'))}/" if prefix.strip("/") else ""
        self._client: Any = None
        self._lock = threading.Lock()
        # Where the next chunk of each object begins that this process appends to.
        self._ends: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def get(self, key: str) -> bytes:
        with self._errors("read", key):
            body: bytes = self._s3.get_object(Bucket=self._bucket, Key=self._key(key))["Body"].read()
        return body

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._errors("read", key):
                found = self._head(key)
        except ObjectNotFound:
            return None
        return ObjectInfo(key=key, size=found["ContentLength"], etag=found["ETag"])

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        if not if_absent and if_match is None:
            return self._put(key, data)
        if self.caveat() is None:
            return self._put(key, data, if_match=if_match, if_absent=if_absent)
        with _read_check_write:
            current = self.head(key)
            if if_absent and current is not None:
                raise PreconditionFailed(key, "it exists already")
            if if_match is not None and (current is None or current.etag != if_match):
                raise PreconditionFailed(key, "it has changed since it was read")
            return self._put(key, data)

    def caveat(self) -> str | None:
        """What this store cannot promise, for a warning; None where it keeps conditions.

        Tried once in a process, on an object that is taken out again. Raises StoreError.
        """
        with self._errors("write", "anything"):
            name = (self._s3.meta.endpoint_url, self._bucket)
        with _caveats_lock:
            if name not in _caveats:
                _caveats[name] = self._try_conditions()
            return _caveats[name]

    def _try_conditions(self) -> str | None:
        key = f"probe/{uuid.uuid4().hex}"
        try:
            try:
                etag = self._put(key, b"1", if_absent=True)
                self._put(key, b"2", if_match=etag)
            except PreconditionFailed:  # kept so well that a put whose answer was lost is refused again
                return None
            for name, condition in (("If-None-Match", {"if_absent": True}), ("If-Match", {"if_match": etag})):
                try:
                    self._put(key, b"3", **condition)
                except PreconditionFailed:
                    continue
                return _caveat(self.url, f"ignores {name}")
        except _NotImplementedThere:
            return _caveat(self.url, "refuses conditional puts")
        finally:
            self.delete(key)
        return None

    def _put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match else {}
        try:
            with self._errors("write", key):
                etag: str = self._s3.put_object(
                    Bucket=self._bucket,
                    Key=self._key(key),
                    Body=data,
                    ChecksumAlgorithm="SHA256",
                    **condition,
                )["ETag"]
        except ObjectNotFound as error:  # S3's answer to If-Match where there is no object
            raise PreconditionFailed(key, "it has been deleted since it was read") from error
        return etag

    def put_file(self, key: str, path: Path, *, move: bool = False) -> None:
        with self._errors("write", key):
            self._s3.upload_file(
                str(path),
                self._bucket,
                self._key(key),
                ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                Config=_transfer(),
            )
        if move:
            path.unlink()

    def fetch(self, key: str, destination: Path) -> Path:
        temporary = destination.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{destination.name}")
        try:
            with self._errors("read", key):
                destination.parent.mkdir(parents=True, exist_ok=True)
                self._s3.download_file(self._bucket, self._key(key), str(temporary), Config=_transfer())
                os.replace(temporary, destination)
        finally:
            temporary.unlink(missing_ok=True)
        return destination

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._list(prefix)

    def delete(self, key: str) -> None:
        with self._errors("write", key):
            self._s3.delete_object(Bucket=self._bucket, Key=self._key(key))

    def append(self, key: str, data: bytes) -> None:
        if not data:
            return
        if key not in self._ends:
            self._ends[key] = max(
                (_offset(chunk.key) + chunk.size for chunk in self._list(f"{key}/")), default=0
            )
        start = self._ends[key]
        chunk = f"{key}/{start:0{_OFFSET_DIGITS}d}"
        try:
            self.put(chunk, data, if_absent=True)
        except PreconditionFailed:
            # A put that was sent again after its answer was lost; else somebody else appends too.
            if self.get(chunk) != data:
                raise
        self._ends[key] = start + len(data)

    def read_appended(self, key: str, offset: int) -> bytes:
        before = f"{key}/{offset - 1:0{_OFFSET_DIGITS}d}" if offset else None
        chunks = [chunk.key for chunk in self._list(f"{key}/", after=before)]
        if len(chunks) < 2:
            return b"".join(map(self.get, chunks))
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            return b"".join(pool.map(self.get, chunks))

    def clock_difference_s(self) -> float:
        """How far this machine's clock is ahead of the service's, to a second."""
        with self._errors("read", "the clock"):
            answer = self._s3.list_objects_v2(Bucket=self._bucket, MaxKeys=1)
        told = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return time.time() - told.timestamp()

    @property
    def _s3(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client()
            return self._client

    def _head(self, key: str) -> Any:
        from botocore.exceptions import ClientError

        try:
            return self._s3.head_object(Bucket=self._bucket, Key=self._key(key))
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _NAMELESS:
                # The answer to a HEAD says no more than its status; that to a GET has the reason.
                self._s3.get_object(Bucket=self._bucket, Key=self._key(key), Range="bytes=0-0")
            raise

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _list(self, prefix: str, *, after: str | None = None) -> Iterator[ObjectInfo]:
        start = {"StartAfter": self._prefix + after} if after else {}
        pages = self._s3.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix, **start
        )
        with self._errors("list", prefix):
            for page in pages:
                for found in page.get("Contents", ()):
                    yield ObjectInfo(
                        key=found["Key"].removeprefix(self._prefix), size=found["Size"], etag=found["ETag"]
                    )

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error, S3UploadFailedError
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            CredentialRetrievalError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
            SSOError,
            TokenRetrievalError,
        )

        try:
            yield
        except ClientError as error:
            raise self._explain(action, key, error) from error
        except S3UploadFailedError as error:
            cause = error.__context__
            if isinstance(cause, ClientError):
                raise self._explain(action, key, cause) from error
            raise StoreError(f"store {self.url}: cannot {action} {key}: {error}") from error
        except NoCredentialsError as error:
            raise StoreError(
                f"store {self.url}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE"
            ) from error
        except (
            CredentialRetrievalError,
            PartialCredentialsError,
            ProfileNotFound,
            SSOError,
            TokenRetrievalError,
        ) as error:
            raise StoreError(
                f"store {self.url}: no usable credentials: {error}. Check AWS_PROFILE and the AWS_… "
                "variables, or log in again (aws sso login)"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(
                f"store {self.url}: cannot {action} {key}: {error}. Check the network and AWS_ENDPOINT_URL"
            ) from error
        except OSError as error:
            raise StoreError(
                f"store {self.url}: cannot {action} {key}: {error.strerror or error} (on this machine)"
            ) from error

    def _explain(self, action: str, key: str, error: ClientError) -> StoreError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return PreconditionFailed(key, "somebody else wrote it meanwhile")
        if code == "NoSuchKey" or (code == "404" and action == "read"):
            return ObjectNotFound(key, self.url)
        if status == 501:
            return _NotImplementedThere(f"store {self.url}: cannot {action} {key}: the service refuses it")
        named = _ALSO_CALLED.get(code, code)
        reason = _NEXT_STEP.get(
            named, f"{code} ({status}): {error.response.get('Error', {}).get('Message', '')}"
        )
        return StoreError(f"store {self.url}: cannot {action} {key}: {reason}")


class _NotImplementedThere(StoreError):
    """The service does not know what was asked of it."""


def _caveat(url: str, finding: str) -> str:
    return (
        f"store {url} {finding}: objects are read and compared before they are written instead, which "
        "protects one orchestrator from itself only. Let nobody else build in this store, or use one that "
        "has conditional puts (AWS S3, versitygw, a folder)"
    )


def _offset(chunk: str) -> int:
    return int(chunk.rsplit("/", 1)[-1])


def _client() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        config=Config(
            retries={"mode": "standard", "max_attempts": 6},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=4 * _PARTS_AT_ONCE,
            user_agent_extra="dagster-nanochat",
        ),
    )


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
    )
