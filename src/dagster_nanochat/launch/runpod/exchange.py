"""Exchanges with RunPod's APIs: what is sent again and what never is, and what is read of an answer.

Reading, deleting and terminating may be repeated without harm, and are, a few times. Creating may not:
RunPod has been seen to answer 500 and create the machine (transformerlab-app #2305). So a creation is
sent again only after 429, and an outcome that nobody knows raises `MaybeCreated`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from dagster_nanochat.launch.runpod.errors import (
    API_KEY_ENV,
    API_URL_ENV,
    MaybeCreated,
    NotFound,
    Problem,
    RateLimited,
    RunPodError,
    Unavailable,
    problem_of,
    refusal,
)

API_URL = "https://api.runpod.io/v2"
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
# RunPod looks for a machine before it answers.
CREATE_TIMEOUT_S = 60.0
ATTEMPTS = 4
# Of one wait, for a quota or between attempts. RunPod's shortest quota is by the minute.
MAX_WAIT_S = 60.0

_Model = TypeVar("_Model", bound=BaseModel)
# The connection was not made, so nothing was sent.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class Exchange:
    """Synchronous; one may be used by several threads. Close it, or use it in a ``with``.

    Every method raises a `RunPodError` of the class that says what to do. sleep, clock (seconds,
    monotonic) and transport are for tests.
    """

    def __init__(
        self,
        api_key: str,
        *,
        base_url: str,
        transport: httpx.BaseTransport | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
        create_timeout_s: float = CREATE_TIMEOUT_S,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # What is no header would be shown in the error that sending it raises.
        if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise ValueError(f"{API_KEY_ENV} is empty or has characters that no RunPod key has")
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{API_URL_ENV}={base_url!r} is not a URL such as {API_URL}")
        self.base_url = base_url.rstrip("/")
        self._key = SecretStr(api_key)
        self._create_timeout = httpx.Timeout(create_timeout_s, connect=CONNECT_TIMEOUT_S)
        self._attempts = attempts
        self._sleep, self._clock = sleep, clock
        self._lock = threading.Lock()
        self._quota_at = 0.0
        self._http = httpx.Client(
            transport=transport,
            timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
            headers={
                "Authorization": f"Bearer {api_key}",
                "User-Agent": f"dagster-nanochat/{version('dagster-nanochat')}",
                "Accept": "application/json, application/problem+json",
            },
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------
    # Exchanges

    def _create(self, path: str, body: Mapping[str, Any], model: type[_Model]) -> _Model:
        what = f"POST {path}"
        try:
            response = self._exchange("POST", path, body=body, creates=True)
        except Unavailable as error:
            if error.status is None and isinstance(error.__cause__, _NOT_SENT):
                raise
            raise MaybeCreated(error.what, error.problem) from error
        try:
            return self._read(model, self._document(response, what), what)
        except RunPodError as error:
            raise MaybeCreated(error.what, error.problem) from error

    def _remove(self, method: str, path: str, *, body: Mapping[str, Any] | None = None) -> None:
        try:
            self._exchange(method, path, body=body)
        except NotFound:
            return

    def _pages(
        self, path: str, key: str, model: type[_Model], params: Mapping[str, str | int] | None = None
    ) -> list[_Model]:
        what = f"GET {path}"
        items: list[_Model] = []
        cursors: set[str] = set()
        query = dict(params or {})
        while True:
            document = self._json("GET", path, params=query)
            # Missing is not empty: a sweeper must never take a strange answer for "no machines".
            if key not in document:
                raise RunPodError(f"{what}: the answer has no {key!r}; is {self.base_url} RunPod's API v2?")
            items += [self._read(model, item, what) for item in document[key] or ()]
            cursor = (document.get("pagination") or {}).get("nextCursor")
            if not cursor:
                return items
            if cursor in cursors:
                raise RunPodError(f"{what}: page {len(cursors) + 1} leads to a page that was read already")
            cursors.add(cursor)
            query["cursor"] = cursor

    def _json(self, method: str, path: str, *, params: Mapping[str, str | int] | None = None) -> Any:
        return self._document(self._exchange(method, path, params=params), f"{method} {path}")

    def _document(self, response: httpx.Response, what: str) -> dict[str, Any]:
        try:
            document = response.json()
        except ValueError:
            document = None
        if isinstance(document, dict):
            return document
        raise RunPodError(
            f"{what}: HTTP {response.status_code} with something that is not a JSON object; is "
            f"{self.base_url} RunPod's API v2?",
            Problem(request_id=response.headers.get("x-request-id")),
        )

    def _read(self, model: type[_Model], document: Any, what: str) -> _Model:
        try:
            return model.model_validate(document)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
                for item in error.errors(include_input=False)
            )
            raise RunPodError(f"{what}: a {model.__name__} that cannot be read ({wrong})") from error

    def _exchange(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: Mapping[str, Any] | None = None,
        creates: bool = False,
    ) -> httpx.Response:
        """Send until it succeeds, as often as may be, to a path or a whole URL. Raises what the last attempt
        came to."""
        what = f"{method} {path}"
        again = (RateLimited,) if creates else (RateLimited, Unavailable)
        attempt = 0
        while True:
            attempt += 1
            self._wait_for_quota()
            failure: RunPodError
            try:
                response = self._http.request(
                    method,
                    path if path.startswith(("http://", "https://")) else self.base_url + path,
                    params=params,
                    json=body,
                    timeout=self._create_timeout if creates else httpx.USE_CLIENT_DEFAULT,
                )
            except httpx.RequestError as error:
                failure = self._unreachable(error, what)
                failure.__cause__ = error
            else:
                self._note_quota(response)
                if response.is_success:
                    return response
                failure = self._refused(response, what)
            wait_s = failure.retry_after_s or min(MAX_WAIT_S, 2.0 ** (attempt - 1))
            if attempt >= self._attempts or wait_s > MAX_WAIT_S or not isinstance(failure, again):
                raise failure
            self._sleep(wait_s)

    def _refused(self, response: httpx.Response, what: str) -> RunPodError:
        try:
            document = json.loads(self._redacted(response.text))
        except ValueError:
            document = None
        text = self._redacted(response.text)
        return refusal(what, problem_of(response.status_code, document, text, response.headers))

    def _unreachable(self, error: httpx.RequestError, what: str) -> Unavailable:
        said = self._redacted(str(error))
        reason = f"{type(error).__name__}{f' ({said})' if said else ''}"
        return Unavailable(f"{what}: no answer from {self.base_url}: {reason}")

    def _redacted(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), "[the key]")

    # ----------------------------------------------------------------------------------------------
    # Quotas

    def _note_quota(self, response: httpx.Response) -> None:
        """Where a quota is used up, no thread asks before its window ends (or MAX_WAIT_S have passed)."""
        wait_s = max(_exhausted_s(response.headers.get("ratelimit", "")), default=0.0)
        if wait_s:
            with self._lock:
                self._quota_at = max(self._quota_at, self._clock() + min(wait_s, MAX_WAIT_S))

    def _wait_for_quota(self) -> None:
        with self._lock:
            wait_s = self._quota_at - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)


def _exhausted_s(header: str) -> list[float]:
    """Seconds until the windows of ``"minute";r=0;t=12, "hour";r=2800;t=1812`` end that allow no more."""
    waits = []
    for window in header.split(","):
        values = dict(part.strip().split("=", 1) for part in window.split(";") if "=" in part)
        if values.get("r") == "0" and values.get("t", "").isdecimal():
            waits.append(float(values["t"]))
    return waits
