"""The ledger: every machine that was ever asked for, and what it has cost.

    ledger/<year>-<month>/<token>.json

An entry is written before the machine is asked for and closed when the machine is known to be gone,
so money that is being spent is in it at any moment. One attempt has one entry; its month is that of
the attempt's token. Dollars are counted from the asking, which is a moment before the billing starts,
and until somebody has seen that the machine is gone: never less than what was billed.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field

from nanochat.store.documents import Document
from nanochat.store.leases import utc_now
from nanochat.store.objects import ObjectNotFound, ObjectStore, PreconditionFailed


class LedgerEntry(Document):
    """machine: the provider's name of it, None until it has told one (what was never had costs nothing).
    nodes: how many it is made of, more than one in a cluster. usd_per_h: of all of it. deadline_at: when
    it should be gone at the latest. ended_at: when it was seen to be gone, None until then. outcome: how
    the attempt ended, or why none was made. in_doubt: the answer to the request was lost, so that there
    may have been a machine: it is counted. twins: what other machines of the same attempt have cost in
    dollars, by their names, made by a request whose answer was lost. billed_usd: what the provider has
    billed in the end for all of them, where it was asked."""

    schema_name: ClassVar[str] = "nanochat.ledger_entry"

    token: str
    provider: str
    model: str
    stage: str
    prefix: str
    offer: str
    usd_per_h: float = Field(ge=0)
    nodes: int = Field(default=1, ge=1)
    user: str
    host: str
    asked_at: datetime.datetime
    deadline_at: datetime.datetime
    machine: str | None = None
    url: str | None = None
    ended_at: datetime.datetime | None = None
    outcome: str = ""
    in_doubt: bool = False
    twins: dict[str, float] = Field(default_factory=dict)
    billed_usd: float | None = None

    @property
    def open(self) -> bool:
        return self.ended_at is None

    def seconds(self, now: datetime.datetime | None = None) -> float:
        """How long the machine has been had, until `now` while it is."""
        if self.machine is None and not self.in_doubt:
            return 0.0
        return max(0.0, ((self.ended_at or now or utc_now()) - self.asked_at).total_seconds())

    def dollars(self, now: datetime.datetime | None = None) -> float:
        if self.billed_usd is not None:
            return self.billed_usd
        return self.seconds(now) * self.usd_per_h / 3600 + sum(self.twins.values())


def user_name() -> str:
    """Whose money it is: the name in the ledger."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid {os.getuid()}"


def entry_key(token: str) -> str:
    """Raises ValueError for what is no attempt's token."""
    return f"ledger/{datetime.datetime.strptime(token[:6], '%Y%m'):%Y-%m}/{token}.json"


def write_entry(store: ObjectStore, entry: LedgerEntry) -> None:
    """Put it in, or in place of what was known of it before."""
    store.put(entry_key(entry.token), entry.to_bytes())


def read_entry(store: ObjectStore, token: str) -> LedgerEntry | None:
    try:
        return LedgerEntry.read(store, entry_key(token))
    except ObjectNotFound:
        return None


def change_entry(
    store: ObjectStore, token: str, change: Callable[[LedgerEntry], Mapping[str, Any]]
) -> LedgerEntry | None:
    """Note what `change` makes of the entry, whoever else changes it meanwhile; the entry as it is now, or
    None where there is none."""
    while True:
        found = LedgerEntry.read_with_etag(store, entry_key(token))
        if found is None:
            return None
        entry, etag = found
        changed = entry.model_copy(update=dict(change(entry)))
        if changed == entry:
            return entry
        with contextlib.suppress(PreconditionFailed):
            store.put(entry_key(token), changed.to_bytes(), if_match=etag)
            return changed


def entries(store: ObjectStore, month: str | None = None) -> Iterator[LedgerEntry]:
    """All entries, or those of a month (``2026-11``), the oldest first."""
    for info in sorted(store.list(f"ledger/{month}/" if month else "ledger/"), key=lambda info: info.key):
        yield LedgerEntry.read(store, info.key)


def stage_dollars(store: ObjectStore, prefix: str, tokens: list[str]) -> dict[str, float]:
    """What each of a stage's attempts has cost so far, of those that cost anything."""
    found = (read_entry(store, token) for token in tokens)
    return {entry.token: entry.dollars() for entry in found if entry and entry.prefix == prefix}
