"""Serve models until SIGTERM or Ctrl-C: what was accepted is finished first."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from nanochat.inference.scheduler import Scheduler
from nanochat.serving.app import ServedModel, Serving, create_app

if TYPE_CHECKING:
    from nanochat.inference.engine import Engine

# How long a server that was told to end goes on with what it has accepted.
SHUTDOWN_S = 60


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
) -> None:
    """port: 0 takes a free one. page: what of the chat page people are sent to. max_rows: answers of a model
    that are worked on together. max_waiting: requests that may wait for it besides. Raises OSError where the
    place is taken."""
    if not is_loopback(host) and serving.api_key is None:
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
        config = uvicorn.Config(
            create_app(served, serving), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S
        )
        place = f"[{host}]" if ":" in host else host
        url = f"http://{place}:{listening.getsockname()[1]}"
        names = " and ".join(model.name for model in models)
        answers = "answers" if len(models) == 1 else "answer"
        server = _Server(config, f"{names} {answers} at {url}/v1 (Ctrl-C ends)\nchat page: {url}{page}")

        def end(number: int, frame: object) -> None:
            server.should_exit = True

        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn's own handling begins a little later; and having ended in good order, it sends itself
            # the signal again.
            signal.signal(number, end)
        server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._greeting, flush=True)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
