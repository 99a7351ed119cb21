"""Serve models until SIGTERM or Ctrl-C: what was accepted is finished first."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.inference.scheduler import Scheduler
from nanochat.serving.app import ServedModel, Serving, create_app
from nanochat.serving.gate import Gate

if TYPE_CHECKING:
    from nanochat.inference.engine import Engine

# How long a server that was told to end goes on with what it has accepted.
SHUTDOWN_S = 60.0

# How long an answer that was broken off for it has to reach its client.
_LAST_WORDS_S = 5

# What the system holds of an answer that is not read, and how long an answer waits for its reader then.
_SEND_BUFFER_BYTES = 256 * 1024
STALLED_S = 30.0

# How long a connection may be open before the first request is there.
SILENT_S = 30.0


@dataclass(frozen=True)
class LoadedModel:
    """A model to be served under a name. chat: it was trained to answer, not only to continue a text."""

    name: str
    engine: Engine
    chat: bool


def serve(
    models: Sequence[LoadedModel],
    serving: Serving,
    *,
    host: str,
    port: int,
    page: str,
    max_rows: int,
    max_waiting: int,
    shutdown_s: float = SHUTDOWN_S,
) -> None:
    """port: 0 takes a free one. page: what of the chat page people are sent to. max_rows: answers of a model
    that are worked on together. max_waiting: requests that may wait for it besides. shutdown_s: how long,
    told to end, it goes on with what it has accepted. Raises OSError where the place is taken."""
    if not is_loopback(host) and not serving.api_keys:
        print(
            f"warning: {host} is reachable from other machines and no API key is asked for "
            "(NANOCHAT_API_KEY sets one)",
            file=sys.stderr,
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening, contextlib.ExitStack() as schedulers:
        served = []
        for model in models:
            engine = model.engine
            scheduler = Scheduler(engine.model, engine.tokenizer, max_rows=max_rows, max_waiting=max_waiting)
            served.append(ServedModel(model.name, schedulers.enter_context(scheduler), model.chat))
        place = f"[{host}]" if ":" in host else host
        url = f"http://{place}:{listening.getsockname()[1]}"
        names = " and ".join(model.name for model in models)
        answers = "answers" if len(models) == 1 else "answer"
        greeting = f"{names} {answers} at {url}/v1 (Ctrl-C ends)\nchat page: {url}{page}"
        server = Server(create_app(served, serving), greeting, shutdown_s)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)  # uvicorn's own begins a little later
        server.run(sockets=[listening])


class Server(uvicorn.Server):
    """Says where it listens, once it does. Told to end, it listens on, tells who comes now that it takes no
    more, and ends when what it had accepted is answered; told twice, or after `shutdown_s`, it breaks off
    what is left, whose clients still get the end of a well-formed answer.
    """

    def __init__(self, app: FastAPI, greeting: str, shutdown_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=Connection, log_level="warning", timeout_graceful_shutdown=2 * _LAST_WORDS_S
            )
        )
        self._app = app
        self._greeting = greeting
        self._shutdown_s = shutdown_s
        self._ends_at_s: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in sockets or []:
            # What is accepted from it has it too.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        await super().startup(sockets)
        print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler. (That of uvicorn closes its socket at once, and raises the signal again when it
        has ended.)"""
        now_s = time.monotonic()
        self._ends_at_s = now_s + self._shutdown_s if self._ends_at_s is None else now_s

    async def on_tick(self, counter: int) -> bool:
        if self._ends_at_s is not None:
            gate: Gate = self._app.state.gate
            gate.drain()
            over_s = time.monotonic() - self._ends_at_s
            if over_s >= 0:
                gate.break_off()
            if not gate.open or over_s >= _LAST_WORDS_S:
                self.should_exit = True
        return await super().on_tick(counter)


class Connection(H11Protocol):
    """Is given up where its client asks nothing for SILENT_S, or has stopped reading: for STALLED_S nothing
    more went into the system's buffer. What is sent on waits for the reader meanwhile, and is not piled up
    here."""

    _silent: asyncio.TimerHandle
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        self._silent = self.loop.call_later(SILENT_S, self._end_silence)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._silent.cancel()
        self._read_on()
        super().connection_lost(exc)

    def _end_silence(self) -> None:
        if self.cycle is None:
            self.transport.abort()

    def _read_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
