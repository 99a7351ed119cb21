"""A pod's log lines as its log route tells them."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import threading


@dataclasses.dataclass(frozen=True)
class Line:
    at: datetime.datetime
    number: int
    source: str
    text: str

    @property
    def id(self) -> str:
        return f"{timestamp(self.at)}/{self.number:012d}"

    def event(self) -> bytes:
        data = {"ts": timestamp(self.at), "source": self.source, "line": self.text}
        return f"id: {self.id}\ndata: {json.dumps(data)}\n\n".encode()


class PodLogs:
    """What a pod has said. Lines of a container are forgotten with the container."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def say(self, source: str, text: str) -> None:
        with self._lock:
            self._lines.append(Line(datetime.datetime.now(datetime.UTC), next(self._numbers), source, text))

    def forget_container(self) -> None:
        with self._lock:
            self._lines = [line for line in self._lines if line.source == "system"]

    def after(self, number: int, source: str | None = None) -> list[Line]:
        """The lines that came after line `number`."""
        with self._lock:
            lines = list(self._lines)
        return [line for line in lines if line.number > number and source in (None, line.source)]


def timestamp(at: datetime.datetime) -> str:
    """RFC 3339 in whole seconds, as the platform writes it."""
    return at.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
