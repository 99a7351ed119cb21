"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(what: Callable[[], Any], *, within_s: float = 40.0) -> Any:
    """What `what` returns once that is true of anything."""
    deadline = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited for {within_s:.0f} s in vain"
        time.sleep(0.05)
    return found
