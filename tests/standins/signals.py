"""Signals in processes that tests start."""

from __future__ import annotations

import signal


def listen_to_ctrl_c() -> None:
    """As a `preexec_fn`: a shell starts background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
