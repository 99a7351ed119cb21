"""Ending a connection without an answer."""

from __future__ import annotations

from starlette.types import Receive, Send


async def hang_up(receive: Receive, send: Send) -> None:
    """ASGI has no way to close without an answer: this takes the server's (uvicorn's) connection."""
    send.__self__.transport.abort()  # type: ignore[attr-defined]
    while (await receive())["type"] != "http.disconnect":
        pass
