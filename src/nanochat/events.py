"""The event stream of an attempt: one JSON object a line, each with a `type` and a `time`.

Everything that people and programs see of a run comes from here. The trainer writes its events to
a spool file; the supervisor adds its own and the process's output, and ships all of it to the
store, where any number of readers follow it from a cursor.

Types: `attempt_started`, `phase`, `log`, `step`, `eval`, `sample`, `checkpoint`, `gpu`,
`failed`, `finished`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat.store.objects import ObjectStore

Event = dict[str, Any]
# What an attempt says last, one or the other.
ENDINGS = ("finished", "failed")


def encode_event(type: str, **fields: Any) -> bytes:
    """One line. A number that is not finite becomes null, however deep it lies: JSON has no word for it."""
    event = {"type": type, "time": round(time.time(), 3), **_finite(fields)}
    return (json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class EventWriter:
    """Appends events to a local file, each as one write, so that lines of several writers stay whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)

    def emit(self, type: str, **fields: Any) -> None:
        self._file.write(encode_event(type, **fields))

    def log(self, message: str, level: str = "info") -> None:
        self.emit("log", level=level, message=message)

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far a reader has come: bytes of whole lines read."""

    offset: int = 0


class EventStream:
    """Reads an attempt's events from the store, whole lines only, from a cursor."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store = store
        self._key = key

    def read(self, cursor: Cursor) -> tuple[list[Event], Cursor]:
        """Events after `cursor`, and the cursor behind them. No stream yet: nothing."""
        data = self._store.read_appended(self._key, cursor.offset)
        end = data.rfind(b"\n") + 1
        return list(_parse(data[:end])), Cursor(offset=cursor.offset + end)

    def all(self) -> list[Event]:
        return self.read(Cursor())[0]


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("type"), str):
            yield event
        else:
            yield {"type": "log", "level": "warning", "message": f"unreadable event line: {line[:200]!r}"}


def ending_of(events: Iterable[Event]) -> Event | None:
    """How the attempt that said these has ended; None where it has not, or died without a word."""
    return next((event for event in events if event["type"] in ENDINGS), None)
