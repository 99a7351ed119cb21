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

from nanochat.attempts import describe
from nanochat.events import ENDINGS, Cursor, Event, EventStream

# A run's live asset gets at most a hundred points: so many of steps, so many of evaluations, and the
# last of each.
STEP_POINTS = 48
EVAL_POINTS = 48
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
        elif kind in ENDINGS:
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


# Log lines reach Dagster as Pipes messages, and how an attempt ends is the step's to tell.
_TOLD = {"step", "eval", "checkpoint", "phase"}


class LiveReport:
    """A stage's events for people: progress as log lines, metrics as observations of its live asset."""

    def __init__(self, context: dg.AssetExecutionContext, stage: str, asset: dg.AssetKey) -> None:
        self._context = context
        self._stage = stage
        self._asset = asset
        self._steps: int | None = None
        self._shown: dict[str, int] = {}
        self._gpu: dict[str, float] = {}

    def tell(self, event: Event) -> None:
        kind = event["type"]
        if kind == "step":
            self._steps = int(event["steps"])
            if event["step"] != 1 and not self._due(kind, int(event["step"]), STEP_POINTS):
                return
            self._observe({**_numbers(event), **self._gpu})
        elif kind == "gpu":
            self._gpu = _numbers(event)
        elif kind == "eval" and self._due(kind, int(event["step"]), EVAL_POINTS):
            metrics = {name: float(value) for name, value in event["metrics"].items() if value is not None}
            self._observe({"step": float(event["step"]), **metrics})
        if kind in _TOLD:
            self._context.log.info(describe(event, self._stage))

    def _due(self, kind: str, step: int, points: int) -> bool:
        """Whether the training is in another of `points` equal parts than at the last point shown."""
        part = step if self._steps is None else step * points // self._steps
        due = self._shown.get(kind) != part
        self._shown[kind] = part
        return due

    def _observe(self, metrics: dict[str, float]) -> None:
        self._context.log_event(dg.AssetObservation(asset_key=self._asset, metadata=metrics))


def _numbers(event: Event) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in event.items()
        if name not in ("type", "time", "steps") and isinstance(value, int | float)
    }
