"""Faults on demand: what goes wrong with which request, and how often."""

from __future__ import annotations

import re
import threading
from typing import Any, Literal

from pydantic import BaseModel


class Fault(BaseModel):
    """match: a regular expression searched in ``METHOD /path``. times: how many requests it spoils.

    slow: the server waits `pause_s` before every 64 KiB of the body. cut: the body ends after `after`
    bytes. wrong_bytes: the byte at `after` is flipped. status: the answer is `status`, with `headers`.
    """

    match: str
    kind: Literal["cut", "slow", "wrong_bytes", "status"]
    times: int = 1
    after: int = 0
    pause_s: float = 0.0
    status: int = 500
    headers: dict[str, str] = {}


class Faults:
    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, document: dict[str, Any]) -> None:
        with self._lock:
            self._faults.append(Fault.model_validate(document))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, request: str, kinds: tuple[str, ...]) -> Fault | None:
        """The fault that meets this request now, if any; it has one time less afterwards."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.kind in kinds and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None
