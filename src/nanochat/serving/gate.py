"""What is refused before a request is read: strangers, floods, bodies that are too long, and, once the
server is told to end, everything new.

What may pile up has a bound: a client's requests by `Limits.client_…`, those of all clients by
`open_requests`. A request is open from its head until the last byte of its answer is taken, so
slow readers count too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import os
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serving.errors import ApiError, overloaded

_log = logging.getLogger(__name__)

# One key or several with commas between, of which clients must send one.
KEYS_ENV = "NANOCHAT_API_KEY"
_MINUTE_S = 60.0

_DISCARD_BYTES = 32 << 20
_DISCARD_S = 5.0


def configured_keys() -> tuple[str, ...]:
    """The API keys that the environment names; none where anybody may ask."""
    keys = os.environ.get(KEYS_ENV, "").split(",")
    return tuple(key.strip() for key in keys if key.strip())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """body_bytes, body_s: how long a request's body may be, and how long it may take to come.
    open_requests: of all clients together. client_…: of one client, by its key where keys are asked for, else
    by its address; None is no limit.
    """

    body_bytes: int = 1 << 20
    body_s: float = 30.0
    open_requests: int = 320
    client_requests_per_minute: int | None = None
    client_open_requests: int | None = None


class Gate:
    """Counts what is open, and says who may not come in. Used in the event loop's thread only.

    keys: any of them opens; without any everybody may come in.
    """

    def __init__(
        self, limits: Limits, keys: tuple[str, ...] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.open = 0
        self.draining = False
        self.refused: Counter[int] = Counter()
        # How to break off each answer that is being written.
        self.breaks: set[Callable[[], None]] = set()
        self._keys = keys
        self._open_of: Counter[str] = Counter()
        self._buckets = Buckets(limits.client_requests_per_minute, clock)

    def drain(self) -> None:
        """Take no more questions; `open` falls to 0 as those that came in are answered."""
        self.draining = True

    def break_off(self) -> None:
        """End every answer where it is."""
        for end in self.breaks:
            end()

    def client(self, scope: Scope) -> str:
        """Who asks. Raises ApiError where a key is asked for and the request has none of them."""
        headers = dict(scope["headers"])
        if not self._keys:
            return str(scope["client"][0]) if scope.get("client") else ""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        for number, key in enumerate(self._keys):
            if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key.encode()):
                return f"key {number}"
        raise ApiError(
            401,
            "the API key is missing or wrong: send it as `Authorization: Bearer …`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def enter(self, client: str) -> None:
        """Count a question in. Raises ApiError where there is no room for it."""
        if self.draining:
            raise shutting_down()
        if self.open >= self.limits.open_requests:
            raise overloaded(f"{self.open} requests are open, which is as many as may; try again")
        most = self.limits.client_open_requests
        if most is not None and self._open_of[client] >= most:
            raise too_many(f"{most} requests of yours are open, which is as many as may", wait_s=1)
        wait_s = self._buckets.take(client)
        if wait_s > 0:
            rate = self.limits.client_requests_per_minute
            raise too_many(f"you may send {rate} requests a minute", wait_s=wait_s)
        self.open += 1
        self._open_of[client] += 1

    def leave(self, client: str) -> None:
        """Count one out."""
        self.open -= 1
        self._open_of[client] -= 1
        if not self._open_of[client]:
            del self._open_of[client]


class Buckets:
    """A request takes one from its client's bucket, which holds a minute's worth and fills steadily.

    A bucket that is full again is forgotten, so there are no more of them than clients of the last minute.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        # What was in it at that time, longest ago first.
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def take(self, client: str) -> float:
        """0 where there was one to take, else the seconds until there is."""
        if self._per_minute is None:
            return 0.0
        now, fill_per_s = self._clock(), self._per_minute / _MINUTE_S
        while self._known and now - next(iter(self._known.values()))[1] >= _MINUTE_S:
            self._known.popitem(last=False)
        held, then = self._known.get(client, (float(self._per_minute), now))
        held = min(self._per_minute, held + (now - then) * fill_per_s)
        if held < 1:
            return (1 - held) / fill_per_s
        self._known[client] = held - 1, now
        self._known.move_to_end(client)
        return 0.0


class Gated:
    """The application behind its gate: `/v1/…` is for those with a key, and what is posted there counts."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = scope["method"] == "POST" and scope["path"].startswith("/v1/")
        try:
            client = self._gate.client(scope) if scope["path"].startswith("/v1/") else ""
            announced = dict(scope["headers"]).get(b"content-length", b"0")
            if not announced.isdigit() or int(announced) > self._gate.limits.body_bytes:
                raise ApiError(413, self._too_long, code="body_too_large")
            if counted:
                self._gate.enter(client)
        except ApiError as error:
            self._gate.refused[error.status] += 1
            await _discard(receive)
            headers = {**error.headers, "Connection": "close"}
            await JSONResponse(error.document(), error.status, headers=headers)(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, self._limited(receive), noted)
        except Exception as error:
            log_failure("a request failed", error)
            if not begun:
                failed = ApiError(500, "the server failed on this request", code="server_failed")
                await JSONResponse(failed.document(), failed.status)(scope, receive, send)
        finally:
            if counted:
                self._gate.leave(client)

    def _limited(self, receive: Receive) -> Receive:
        read_bytes, complete = 0, False
        end_s = time.monotonic() + self._gate.limits.body_s

        async def limited() -> Message:
            nonlocal read_bytes, complete
            if complete:  # what comes now is that the client has gone, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end_s - time.monotonic())
            except TimeoutError:
                raise HTTPException(
                    408, "the body did not come in time", headers={"Connection": "close"}
                ) from None
            read_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read_bytes > self._gate.limits.body_bytes:
                if not complete:
                    await _discard(receive)
                raise HTTPException(413, self._too_long, headers={"Connection": "close"})
            return message

        return limited

    @property
    def _too_long(self) -> str:
        return f"the body is longer than {self._gate.limits.body_bytes} bytes"


async def _discard(receive: Receive) -> None:
    """Read the rest of a refused body, as far as it is sensible: many clients look for an answer only when
    they have sent all of it, and lose it where the connection is closed before."""
    read_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while read_bytes < _DISCARD_BYTES:
                message = await receive()
                read_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def log_failure(what: str, error: BaseException) -> None:
    """Where it happened and of what kind, without the message: that may quote what a client sent."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s: %s\n%s", what, type(error).__name__, where)


def too_many(message: str, *, wait_s: float) -> ApiError:
    """One client's requests are too many: OpenAI's clients wait as long as they are told, and try again."""
    headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return ApiError(429, f"{message}; try again later", code="rate_limit_exceeded", headers=headers)


def shutting_down() -> ApiError:
    error = overloaded("the server is shutting down", code="shutting_down")
    error.headers["Connection"] = "close"
    return error
