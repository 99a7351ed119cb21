"""What a person at a terminal sees of a run: steps as they begin and end, progress as lines or as a bar."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping

import dagster as dg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PROGRESS_LEVEL = logging.INFO
LOGGER = "progress"

_TELL_EVERY_S = 5.0

# One for lines and bars: else a line is written into the bar. It finds standard output when it prints.
_terminal = Console(highlight=False)

Tell = Callable[[int, int], None]
"""Called with what is done and all of it, as often as one likes."""


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


class TerminalHandler(logging.Handler):
    """Writes to standard output, above a bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _terminal.out(self.format(record), highlight=False)
        except Exception:
            self.handleError(record)


@dg.logger({}, description="Progress for people at a terminal")
def progress_logger(context: dg.InitLoggerContext) -> logging.Logger:
    logger = logging.Logger("nanochat.progress", level=logging.DEBUG)
    handler = TerminalHandler()
    handler.setFormatter(ProgressFormatter())
    handler.addFilter(ProgressFilter())
    logger.addHandler(handler)
    return logger


@contextlib.contextmanager
def progress_told(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, what: str, of: str
) -> Iterator[Tell]:
    """A way to tell how far `what` has come, counted in `of`: to Dagster's log every few seconds.

    A person at a terminal gets a bar, which is gone at the end, instead of all lines but the last.
    """
    with _bar(context, what, of) as draw:
        told_at = time.monotonic()

        def tell(done: int, all_of_it: int) -> None:
            nonlocal told_at
            if draw:
                draw(done, all_of_it)
            if done == all_of_it or time.monotonic() - told_at >= _TELL_EVERY_S:
                told_at = time.monotonic()
                seen = done < all_of_it and draw is not None
                level = logging.DEBUG if seen else logging.INFO
                context.log.log(level, f"{what}: {done:,} of {all_of_it:,} {of}")

        yield tell


@contextlib.contextmanager
def _bar(
    context: dg.OpExecutionContext | dg.AssetExecutionContext, what: str, of: str
) -> Iterator[Tell | None]:
    """What draws a bar; None where the run does not log to a terminal."""
    loggers = context.run.run_config.get("loggers")
    if not (_terminal.is_interactive and isinstance(loggers, Mapping) and LOGGER in loggers):
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(of),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, all_of_it: progress.update(task, completed=done, total=all_of_it)
