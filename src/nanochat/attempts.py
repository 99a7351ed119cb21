"""The attempts at a stage as people look at them: which there were, what they said, how to end one."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from nanochat.events import ENDINGS, Cursor, Event, EventStream
from nanochat.store import ObjectStore
from nanochat.store.documents import Document
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import Lease, read_lease, utc_now
from nanochat.store.objects import ObjectNotFound

_FOLLOW_EVERY_S = 1.0
_FOLLOW_SILENT_FOR_S = 5.0


class CancelRequest(Document):
    """`attempts/<token>/cancel.json`: somebody wants this attempt to end, after a checkpoint.

    Its supervisor looks for it, so a request reaches a machine that nobody can log into.
    """

    schema_name: ClassVar[str] = "nanochat.cancel"
    by: str
    at: datetime.datetime


class AttemptSummary(Document):
    """`attempts/<token>/summary.json`: what an attempt's events have told so far, in a few words.

    offset: how far they have been read. resumed_from: the step whose checkpoint it went on from, 0 for
    a beginning, None before its first step. step, checkpoint: the last it made. ended: `finished` or
    the failure's word; None while it works, or where it died without a word.
    """

    schema_name: ClassVar[str] = "nanochat.attempt_summary"
    offset: int = 0
    started_at: datetime.datetime | None = None
    resumed_from: int | None = None
    step: int | None = None
    checkpoint: int | None = None
    ended: str | None = None
    message: str = ""

    def after(self, events: Iterable[Event], cursor: Cursor) -> AttemptSummary:
        """The summary once these were read too."""
        news: dict[str, Any] = {}
        for event in events:
            match event["type"]:
                case "attempt_started":
                    news["started_at"] = datetime.datetime.fromtimestamp(event["time"], datetime.UTC)
                case "step":
                    news["step"] = event["step"]
                    if self.resumed_from is None:
                        news.setdefault("resumed_from", event["step"] - 1)
                case "checkpoint":
                    news["checkpoint"] = event["step"]
                case "finished":
                    news["ended"] = "finished"
                case "failed":
                    news |= {"ended": event["failure"], "message": event["message"]}
        return self.model_copy(update={**news, "offset": cursor.offset})

    def row(self, token: str) -> dict[str, str | int | None]:
        """As a line of a table."""
        return {
            "attempt": token,
            "started": f"{self.started_at:%Y-%m-%d %H:%M:%S} UTC" if self.started_at else None,
            "from step": self.resumed_from,
            "to step": self.step,
            "checkpoint": self.checkpoint,
            "ended": self.ended or "without a word",
            "why": self.message.partition("\n")[0],
        }


def read_summary(store: ObjectStore, prefix: str, token: str) -> AttemptSummary:
    """What the last watcher wrote down; an empty one where there was none."""
    try:
        return AttemptSummary.read(store, _summary_key(prefix, token))
    except ObjectNotFound:
        return AttemptSummary()


def write_summary(store: ObjectStore, prefix: str, token: str, summary: AttemptSummary) -> None:
    store.put(_summary_key(prefix, token), summary.to_bytes())


def _summary_key(prefix: str, token: str) -> str:
    return f"{attempt_prefix(prefix, token)}/summary.json"


def summaries(store: ObjectStore, prefix: str) -> dict[str, AttemptSummary]:
    """Every attempt at a stage by its token, the oldest first, with what nobody has read yet."""
    found = {}
    for token in attempts(store, prefix):
        summary = read_summary(store, prefix, token)
        stream = EventStream(store, f"{attempt_prefix(prefix, token)}/events.jsonl")
        found[token] = summary.after(*stream.read(Cursor(offset=summary.offset)))
    return found


def attempts(store: ObjectStore, prefix: str) -> list[str]:
    """Tokens of a stage's attempts, the oldest first (they begin with the time)."""
    start = f"{prefix}/attempts/"
    return sorted({info.key.removeprefix(start).partition("/")[0] for info in store.list(start)})


def live_attempt(store: ObjectStore, prefix: str) -> Lease | None:
    """The lease of the attempt that works on the stage now; its token is the attempt's."""
    lease = read_lease(store, f"{prefix}/lease.json")
    return lease if lease is not None and lease.live(utc_now()) else None


def request_cancel(store: ObjectStore, prefix: str, token: str, by: str) -> None:
    """Ask the attempt to end. It may take as long as a step and a checkpoint."""
    store.put(_cancel_key(prefix, token), CancelRequest(by=by, at=utc_now()).to_bytes())


def cancel_requested(store: ObjectStore, prefix: str, token: str) -> CancelRequest | None:
    try:
        return CancelRequest.read(store, _cancel_key(prefix, token))
    except ObjectNotFound:
        return None


def _cancel_key(prefix: str, token: str) -> str:
    return f"{attempt_prefix(prefix, token)}/cancel.json"


def read_events(store: ObjectStore, prefix: str, token: str, *, follow: bool = False) -> Iterator[Event]:
    """An attempt's events; with `follow`, new ones as they come until it has ended or is gone."""
    stream = EventStream(store, f"{attempt_prefix(prefix, token)}/events.jsonl")
    cursor = Cursor()
    gone_at: float | None = None
    while True:
        events, cursor = stream.read(cursor)
        for event in events:
            yield event
            if event["type"] in ENDINGS:
                return
        if not follow:
            return
        lease = live_attempt(store, prefix)
        if lease is not None and lease.token == token:
            gone_at = None
        elif gone_at is None:
            gone_at = time.monotonic()
        elif time.monotonic() - gone_at > _FOLLOW_SILENT_FOR_S:
            return
        time.sleep(_FOLLOW_EVERY_S)


def describe(event: Event, stage: str) -> str | None:
    """The event as a line for people; None for what is not for them."""
    match event["type"]:
        case "attempt_started":
            return f"{stage}: attempt {event['token']} on {event['host']} (pid {event['pid']})"
        case "phase":
            return f"{stage}: {event['name']}"
        case "log":
            return str(event.get("message", ""))
        case "step":
            return _progress(stage, event)
        case "eval":
            metrics = {name: value for name, value in event["metrics"].items() if value is not None}
            shown = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
            return f"{stage} step {event['step']}: {shown}"
        case "checkpoint":
            return f"{stage} step {event['step']}: checkpoint committed"
        case "finished":
            return f"{stage}: finished after {event['seconds']:.0f} s, receipt {event['receipt'][:12]}"
        case "failed":
            return f"{stage}: ended with {event['failure']}: {event['message']}"
    return None


def _progress(stage: str, event: Event) -> str:
    """``base step 400/1600  loss 2.310  41.2k tok/s  ETA 1:58``."""
    eta = int(event.get("eta_s") or 0)
    rate = float(event.get("tokens_per_s") or 0)
    loss = event.get("loss")
    return (
        f"{stage} step {event['step']}/{event['steps']}  "
        f"loss {'nan' if loss is None else f'{loss:.3f}'}  "
        f"{rate / 1000:.1f}k tok/s  ETA {eta // 60}:{eta % 60:02d}"
    )
