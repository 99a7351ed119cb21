"""Shards in the store: ingested once, verified, recorded, read.

A shard is a parquet file with a ``text`` column. It is in the store when its record is there
(written last) and the object has the recorded size; `verify_shard` compares the content too. In
``copy`` mode the store holds the bytes. In ``reference`` mode it holds only what the hub says of
them, and every machine pulls and verifies the shards it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import ClassVar, Literal

from nanochat.data.hub import HubError, download_address, fetch_verified
from nanochat.data.parquet import inspect_text
from nanochat.data.sources import PinnedSource, ShardLocation, Source, get_source
from nanochat.data.staging import Stop, alone, staging_folder
from nanochat.store import ObjectNotFound, ObjectStore, StoreError
from nanochat.store.digests import digest_file
from nanochat.store.documents import Document, DocumentError
from nanochat.store.layout import shard_key, shard_record_key
from nanochat.store.local import cached_path, local_copy
from nanochat.store.receipts import FileRef

Mode = Literal["copy", "reference"]


class ShardError(ValueError):
    """A shard that cannot be used: which one, why, and the next step."""


class ShardRecord(Document):
    """What is known of a verified shard.

    rows: documents in the file. empty: how many of them are null or blank; readers skip them.
    characters: of the others. All three are None in reference mode, where nobody has read the file.
    """

    schema_name: ClassVar[str] = "nanochat.shard"

    source: str
    shard: str
    mode: Mode
    revision: str
    url: str
    size_bytes: int
    sha256: str
    rows: int | None
    empty: int | None
    characters: int | None
    seconds: float

    @property
    def key(self) -> str:
        """The store's key of the parquet file."""
        return shard_key(self.source, self.shard)

    @property
    def file(self) -> FileRef:
        return FileRef(key=self.key, size_bytes=self.size_bytes, sha256=self.sha256)


@dataclasses.dataclass(frozen=True)
class IngestReport:
    """What an ingestion did: records of new and of already verified shards, and why others failed."""

    landed: tuple[ShardRecord, ...]
    skipped: tuple[ShardRecord, ...]
    failed: dict[str, str]


def ingest_shards(
    store: ObjectStore,
    source: Source,
    keys: Sequence[str],
    *,
    threads: int = 4,
    mode: Mode = "copy",
    on_landed: Callable[[ShardRecord], None] = lambda record: None,
    force: bool = False,
    refresh: bool = False,
) -> IngestReport:
    """Bring `keys` of `source` into the store, `threads` at a time, and record each as it lands.

    What is verified already is skipped. A shard that fails does not stop the others: it is in the
    report's `failed`, and the next call does only what is missing. `on_landed` is called on the
    calling thread. Sources without a hub are always copied. force: do verified ones again.
    refresh: first take the source's newest revision. An exception on the calling thread (an
    interrupt, too) makes the others give up what they are at; what has arrived is continued later.

    Raises ShardError for keys the source does not have; SourceError, HubError or StoreError where
    the source itself or the store cannot be used.
    """
    known = {*source.training_shards(), source.validation_shard()}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise ShardError(
            f"source {source.name} has no shard {', '.join(unknown[:3])}"
            f"{' …' if len(unknown) > 3 else ''}; its shards are {_extent(source)}"
        )
    pinned = source.pin(store, refresh=refresh)
    stop = Stop()
    job = _Ingestion(store, source.name, pinned, mode if source.has_hub else "copy", force, stop)
    landed: dict[str, ShardRecord] = {}
    skipped: dict[str, ShardRecord] = {}
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ingest")
    try:
        futures: dict[Future[tuple[ShardRecord, bool]], str] = {
            pool.submit(job.ingest, key): key for key in dict.fromkeys(keys)
        }
        for future in as_completed(futures):
            key = futures[future]
            try:
                record, is_new = future.result()
            except (ValueError, OSError, HubError, StoreError) as error:
                failed[key] = str(error)
                continue
            if is_new:
                landed[key] = record
                on_landed(record)
            else:
                skipped[key] = record
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    order = {key: index for index, key in enumerate(keys)}
    return IngestReport(
        landed=tuple(landed[key] for key in sorted(landed, key=order.__getitem__)),
        skipped=tuple(skipped[key] for key in sorted(skipped, key=order.__getitem__)),
        failed={key: failed[key] for key in sorted(failed, key=order.__getitem__)},
    )


@dataclasses.dataclass(frozen=True)
class _Ingestion:
    """One call of `ingest_shards`: what all its shards have in common."""

    store: ObjectStore
    source: str
    pinned: PinnedSource
    mode: Mode
    force: bool
    stop: Stop

    def ingest(self, key: str) -> tuple[ShardRecord, bool]:
        """The shard's record, and whether it is new."""
        started = time.monotonic()
        staged = staging_folder(self.store, f"shards/{self.source}") / f"{key}.parquet"
        # Two runs may want the same shard: one fetches it.
        with alone(self.store, staged.with_name(f"{key}.lock"), self.stop):
            record = read_record(self.store, self.source, key)
            if record and not self.force and self._is_current(record):
                return record, False
            location = self.pinned.locate(key)
            rows = empty = characters = None
            if self.mode == "copy":
                stored = None if self.force else self._stored(key, location)
                if stored is None:
                    self._fetch(key, location, staged)
                rows, empty, characters = inspect_text(stored or staged, f"shard {key} of {self.source}")
                if stored is None:
                    self.store.put_file(shard_key(self.source, key), staged, move=True)
            record = ShardRecord(
                source=self.source,
                shard=key,
                mode=self.mode,
                revision=self.pinned.revision,
                url=location.url,
                size_bytes=location.size_bytes,
                sha256=location.sha256,
                rows=rows,
                empty=empty,
                characters=characters,
                seconds=round(time.monotonic() - started, 3),
            )
            self.store.put(shard_record_key(self.source, key), record.to_bytes())
            return record, True

    def _is_current(self, record: ShardRecord) -> bool:
        return _lack(self.store, record, self.mode, self.pinned.revision) is None

    def _stored(self, key: str, location: ShardLocation) -> Path | None:
        """The right bytes, where the store holds them though their record is missing or of an older
        revision: a run died between the two, or the new revision left this shard as it was."""
        file = FileRef(
            key=shard_key(self.source, key), size_bytes=location.size_bytes, sha256=location.sha256
        )
        try:
            path = local_copy(self.store, file)
            return path if digest_file(path) == file.sha256 else None
        except (StoreError, FileNotFoundError):
            return None

    def _fetch(self, key: str, location: ShardLocation, staged: Path) -> None:
        fetch_verified(
            lambda destination: self.pinned.fetch(key, destination, self.stop),
            staged,
            size_bytes=location.size_bytes,
            sha256=location.sha256,
            what=f"shard {key} of {self.source} ({location.url})",
        )


def read_record(store: ObjectStore, source: str, key: str) -> ShardRecord | None:
    """The shard's record, or None where there is none that can be read, or one of another shard (it
    is then ingested anew)."""
    try:
        record = ShardRecord.read(store, shard_record_key(source, key))
    except (ObjectNotFound, DocumentError):
        return None
    return record if (record.source, record.shard) == (source, key) else None


def verify_shard(store: ObjectStore, record: ShardRecord) -> str | None:
    """What is wrong with the stored content of a shard, or None. Reads all of it.

    A shard recorded by reference has no content here: nothing is wrong with it.
    """
    if record.mode == "reference":
        return None
    try:
        with _readable(store, record.key) as path:
            return _damage(record, path)
    except (ObjectNotFound, FileNotFoundError):
        return f"shard {record.shard} of {record.source} is recorded, but {record.key} is gone from the store"


def require_shards(
    store: ObjectStore, source: Source, keys: Sequence[str], *, mode: Mode = "copy"
) -> list[ShardRecord]:
    """The records of `keys`, in order.

    Raises ShardError naming what is missing and the command that gets it. mode: "copy" asks for the
    bytes, "reference" is content with a record. A shard of another revision than the source's
    recorded one counts as missing: a text may stand in a training shard of the one and in the
    validation shard of the other. Sizes are compared, content is not read.
    """
    records = {key: read_record(store, source.name, key) for key in keys}
    revision = source.recorded_revision(store)
    lacking: dict[str, list[str]] = {}
    for key, record in records.items():
        lack = _lack(store, record, mode, revision)
        if lack:
            lacking.setdefault(lack, []).append(key)
    if lacking:
        missing = [key for keys_lacking in lacking.values() for key in keys_lacking]
        described = "; ".join(f"{describe_keys(some, source)} ({lack})" for lack, some in lacking.items())
        raise ShardError(
            f"{len(missing)} of {len(keys)} shards of {source.name} are missing: {described}. "
            f"Get them: {command_for(missing, source)}"
        )
    return [record for record in records.values() if record]


def command_for(keys: Sequence[str], source: Source) -> str:
    """The command that ingests `keys`. A range may hold verified shards: they are skipped."""
    order = {key: index for index, key in enumerate(source.training_shards())}
    training = sorted((key for key in keys if key in order), key=order.__getitem__)
    commands = []
    if len(training) == 1:
        commands.append(f"dg launch --job ingest_shards --partition {training[0]}")
    elif training:
        commands.append(f"dg launch --job ingest_shards --partition-range {training[0]}...{training[-1]}")
    if source.validation_shard() in keys:
        commands.append("dg launch --assets validation_files --partition <model>")
    return " and ".join(f"`{command}`" for command in commands)


def describe_keys(keys: Iterable[str], source: Source) -> str:
    """Keys in the source's order, neighbours joined: ``shard_00000…shard_00007, shard_00011``; the
    validation shard is nobody's neighbour."""
    training = source.training_shards()
    order = {key: index for index, key in enumerate(training)}
    order[source.validation_shard()] = len(training) + 1
    runs: list[list[str]] = []
    for key in sorted(keys, key=order.__getitem__):
        if runs and order[key] == order[runs[-1][-1]] + 1:
            runs[-1].append(key)
        else:
            runs.append([key])
    shown = [run[0] if len(run) == 1 else f"{run[0]}…{run[-1]}" for run in runs[:6]]
    return ", ".join(shown) + (f" and {len(runs) - 6} more ranges" if len(runs) > 6 else "")


def shard_path(store: ObjectStore, source: str, key: str) -> Path:
    """Where a shard that was verified when it was ingested can be read. One that is only recorded by
    reference is brought from the hub, once, and verified.

    Raises ShardError where it is not in the store, HubError where the hub does not give it.
    """
    return _readable_shard(store, source, key)[1]


def verified_shard_path(store: ObjectStore, source: str, key: str) -> Path:
    """The same, of a shard whose content is verified now. Raises ShardError where it is damaged."""
    record, path = _readable_shard(store, source, key)
    problem = _damage(record, path)
    if problem and record.mode == "reference":
        path.unlink()
        return _from_hub(store, record)
    if problem:
        raise ShardError(problem)
    return path


def _readable_shard(store: ObjectStore, source: str, key: str) -> tuple[ShardRecord, Path]:
    record = read_record(store, source, key)
    lack = _lack(store, record, "reference", None)
    if lack:
        raise ShardError(
            f"shard {key} of {source} is {lack}. Get it: {command_for([key], get_source(source))}"
        )
    assert record is not None, "what lacks nothing has a record"
    if record.mode == "reference":
        return record, _from_hub(store, record)
    return record, local_copy(store, record.file)


def _from_hub(store: ObjectStore, record: ShardRecord) -> Path:
    """This machine's copy of a shard that the store does not hold."""
    copy = cached_path(record.sha256)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with alone(store, copy.with_name(f"{record.sha256}.lock")):
        if not copy.exists():
            staged = copy.with_name(f"{record.sha256}.unverified")
            fetch_verified(
                lambda destination: download_address(record.url, destination),
                staged,
                size_bytes=record.size_bytes,
                sha256=record.sha256,
                what=f"shard {record.shard} of {record.source} ({record.url})",
            )
            os.replace(staged, copy)
    return copy


def _damage(record: ShardRecord, path: Path) -> str | None:
    size, found = path.stat().st_size, digest_file(path)
    if (size, found) == (record.size_bytes, record.sha256):
        return None
    return (
        f"shard {record.shard} of {record.source} is damaged in the store: recorded sha256 {record.sha256} "
        f"({record.size_bytes} bytes), found {found} ({size} bytes). Ingest it again with force."
    )


def _lack(store: ObjectStore, record: ShardRecord | None, mode: Mode, revision: str | None) -> str | None:
    """What keeps a shard from being used as `mode` asks, without reading its content; None if nothing.

    revision: what it must be of; None where that does not matter.
    """
    if record is None:
        return "not in the store"
    if revision is not None and record.revision != revision:
        return f"of revision {record.revision[:12]}, the source is at {revision[:12]} now"
    if record.mode == "reference":
        return None if mode == "reference" else "only recorded by reference"
    info = store.head(record.key)
    return None if info is not None and info.size == record.size_bytes else "not in the store"


def _extent(source: Source) -> str:
    training = source.training_shards()
    return f"{training[0]}…{training[-1]} and {source.validation_shard()} for validation"


@contextlib.contextmanager
def _readable(store: ObjectStore, key: str) -> Iterator[Path]:
    local = store.local_path(key)
    if local is not None:
        yield local
        return
    with tempfile.TemporaryDirectory() as folder:
        yield store.fetch(key, Path(folder, "object"))
