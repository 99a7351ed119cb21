"""What a person at a terminal sees of a run: steps as they begin and end, and progress lines."""

from __future__ import annotations

import logging
import sys
import time

import dagster as dg

PROGRESS_LEVEL = logging.INFO


class ProgressFormatter(logging.Formatter):
    """One short line an event; Dagster's own bookkeeping is left out."""

    def __init__(self) -> None:
        super().__init__()
        self._start = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        elapsed = int(time.monotonic() - self._start)
        metadata = getattr(record, "dagster_meta", {}) or {}
        text = metadata.get("orig_message") or record.getMessage()
        step = metadata.get("step_key")
        name = f"{step}: " if step and record.levelno >= logging.WARNING else ""
        return f"[{elapsed // 60:2d}:{elapsed % 60:02d}] {name}{text}"


class ProgressFilter(logging.Filter):
    """Keeps what assets say, and drops Dagster's events except failures."""

    def filter(self, record: logging.LogRecord) -> bool:
        metadata = getattr(record, "dagster_meta", {}) or {}
        text = str(metadata.get("orig_message") or "")
        if metadata.get("dagster_event") is not None or text.startswith("[pipes]"):
            return record.levelno >= logging.ERROR
        return record.levelno >= PROGRESS_LEVEL


@dg.logger({}, description="Progress for people at a terminal")
def progress_logger(context: dg.InitLoggerContext) -> logging.Logger:
    logger = logging.Logger("nanochat.progress", level=logging.DEBUG)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(ProgressFormatter())
    handler.addFilter(ProgressFilter())
    logger.addHandler(handler)
    return logger
