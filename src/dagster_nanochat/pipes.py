"""Pipes over an attempt's event stream.

The stream in the store is the one channel from a training process to Dagster. This reader turns it
into Pipes messages from a cursor, so a step that re-attaches goes on where the last one stopped. It
is pumped by the step that watches, not by a thread: the backlog is always drained, and nothing is
lost when the session closes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster._core.pipes.context import PipesMessageHandler
from dagster_pipes import PIPES_PROTOCOL_VERSION, PipesContextData, PipesMessage, PipesParams

from nanochat.events import Cursor, Event, EventStream

_LEVELS = {"debug", "info", "warning", "error"}


class EventStreamReader(dg.PipesMessageReader):
    """Reads one attempt's events. Make a new one for every session; call `pump()` while watching."""

    def __init__(self, stream: EventStream, cursor: Cursor | None = None) -> None:
        self._stream = stream
        self._handler: PipesMessageHandler | None = None
        self._opened = False
        self._closed = False
        self.cursor = cursor or Cursor()

    @contextlib.contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        self._handler = handler
        try:
            yield {}
            self.pump()
        finally:
            self._handler = None

    def no_messages_debug_text(self) -> str:
        return "Attempted to read the attempt's event stream in the store."

    def pump(self) -> list[Event]:
        """Hand every new event to Dagster, and return them."""
        assert self._handler is not None, "pump() belongs inside the Pipes session"
        events, self.cursor = self._stream.read(self.cursor)
        for event in events:
            for method, params in self._messages(event):
                self._handler.handle_message(
                    PipesMessage(__dagster_pipes_version=PIPES_PROTOCOL_VERSION, method=method, params=params)
                )
        return events

    def _messages(self, event: Event) -> Iterator[tuple[Any, dict[str, Any]]]:
        if not self._opened:
            self._opened = True
            yield "opened", {"extras": {}}
        kind = event["type"]
        if kind == "log":
            level = event.get("level", "info")
            yield (
                "log",
                {
                    "message": str(event.get("message", "")),
                    "level": (level if level in _LEVELS else "info").upper(),
                },
            )
        elif kind in ("finished", "failed"):
            if not self._closed:
                self._closed = True
                yield "closed", {}
        else:
            yield "report_custom_message", {"payload": event}


class NoContext(dg.PipesContextInjector):
    """The training job carries everything; Dagster's own context is not sent."""

    @contextlib.contextmanager
    def inject_context(self, context_data: PipesContextData) -> Iterator[PipesParams]:
        yield {}

    def no_messages_debug_text(self) -> str:
        return "The job in the store carries the context."
