"""A short message to people at the end of a run that has rented machines, where NANOCHAT_WEBHOOK_URL asks
for one.

The body is JSON: the message's fields, and the message as `text`, which Slack and what speaks like it
show. The address is a secret and is told nobody; a message that cannot be sent is a warning, no more.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence

import dagster as dg
from pydantic import BaseModel, ConfigDict

from nanochat.failures import AttemptFailed, Failure
from nanochat.store import ObjectStore, StoreError
from nanochat.store.ledger import read_entry

WEBHOOK_ENV = "NANOCHAT_WEBHOOK_URL"
UI_ENV = "NANOCHAT_UI_URL"
_DEFAULT_UI = "http://127.0.0.1:3000"
_TIMEOUT_S = 10.0
_REASON_CHARACTERS = 300


class PaidRun(BaseModel):
    """How a run of a stage ended. result: ``succeeded`` or the failure's word. dollars: of this run's
    machines. link: the run's page."""

    model_config = ConfigDict(frozen=True)
    model: str
    stage: str
    result: str
    reason: str
    dollars: float
    link: str

    def text(self) -> str:
        ended = "succeeded" if self.result == "succeeded" else f"ended with {self.result}"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.stage} of {self.model} {ended} for ${self.dollars:.2f}{reason} ({self.link})"


def send(message: PaidRun, warn: Callable[[str], object]) -> None:
    """Post the message, once, where an address is set. `warn` is told what went wrong."""
    url = os.environ.get(WEBHOOK_ENV)
    if not url:
        return
    import httpx

    try:
        with _unlogged():
            answer = httpx.post(
                url, json={"text": message.text(), **message.model_dump()}, timeout=_TIMEOUT_S
            )
        problem = None if answer.status_code < 400 else f"it answers {answer.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = type(error).__name__  # its message may have the address
    if problem:
        warn(f"the message to {WEBHOOK_ENV} was not taken: {problem}. What it says: {message.text()}")


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """httpx logs the address of every request."""
    logger = logging.getLogger("httpx")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def told_at_the_end(
    context: dg.AssetExecutionContext, store: ObjectStore, model: str, stage: str, machines: Sequence[str]
) -> Iterator[None]:
    """Send the message when the block ends, well or badly, if it has had any machine by then.

    machines: tokens of its attempts; the ledger knows which of them had a machine, and what that cost.
    """

    def tell(result: str, reason: str) -> None:
        try:
            found = [read_entry(store, token) for token in dict.fromkeys(machines)]
        except (StoreError, ValueError, OSError) as error:
            context.log.warning(f"no message is sent: what the run has cost cannot be read: {error}")
            return
        entries = [entry for entry in found if entry and entry.machine]
        if not entries:
            return
        reason = reason.removeprefix(f"{stage} of {model} ended with {result}: ")
        message = PaidRun(
            model=model,
            stage=stage,
            result=result,
            reason=" ".join(reason.split("\n", 1)[0].split())[:_REASON_CHARACTERS],
            dollars=round(sum(entry.dollars() for entry in entries), 4),
            link=f"{(os.environ.get(UI_ENV) or _DEFAULT_UI).rstrip('/')}/runs/{context.run.run_id}",
        )
        send(message, context.log.warning)

    try:
        yield
    except BaseException as error:
        tell(*_ending(error))
        raise
    tell("succeeded", "")


def _ending(error: BaseException) -> tuple[str, str]:
    """The failure's word and its reason."""
    if isinstance(error, AttemptFailed):
        return error.failure.value, error.message
    if isinstance(error, dg.Failure):
        word = error.metadata.get("failure")
        return str(word.value if word else Failure.FAILED), error.description or ""
    if isinstance(error, dg.DagsterExecutionInterruptedError | KeyboardInterrupt):
        return Failure.CANCELLED.value, "the run was terminated"
    return Failure.FAILED.value, f"{type(error).__name__}: {error}"
