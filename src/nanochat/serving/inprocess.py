"""Asking an ASGI application of this process: what it would send to a socket, piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message


@dataclass(frozen=True)
class Answer:
    """pieces: of the body, as they are sent; to be read once."""

    status: int
    content_type: str
    pieces: AsyncIterator[bytes]

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces])


@contextlib.asynccontextmanager
async def ask(app: ASGIApp, method: str, path: str, body: bytes = b"") -> AsyncIterator[Answer]:
    """The application's answer. Leaving the block is what a client's hanging up is: the application is
    cancelled where it is not through.

    Raises what the application raises before it answers.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    arriving: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if arriving:
            return arriving.pop()
        # As long as the block lasts.
        return await asyncio.Future[Message]()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        "server": ("localhost", 80),
    }
    answering = asyncio.ensure_future(app(scope, receive, sent.put))
    answering.add_done_callback(lambda _: sent.put_nowait(None))

    async def pieces() -> AsyncIterator[bytes]:
        while (message := await sent.get()) is not None:
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    try:
        start = await sent.get()
        if start is None:
            await answering
            raise RuntimeError(f"{method} {path} was not answered")
        headers = dict(start["headers"])
        yield Answer(start["status"], headers.get(b"content-type", b"").decode(), pieces())
    finally:
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await answering
