"""The sweeper: what is rented at RunPod by this store's ledger, and the end of what nobody owns.

It is the last of three layers that end a machine, a pod or a cluster, and knows only the ledger and the
store: it touches none whose name is not ours, and none of another store.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.ending import close_gone, end_machines, end_twin
from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.launch.runpod.machines import Machine, kind_of, list_machines
from dagster_nanochat.launch.runpod.models import Billing, PodStatus
from nanochat.events import EventStream, ending_of
from nanochat.failures import Failure
from nanochat.store import ObjectStore
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import Lease, read_lease, utc_now
from nanochat.store.ledger import LedgerEntry, change_entry, entries, read_entry

# A lease or a watch that ran out so long ago is nobody's: more than clocks differ on machines that are
# kept in time, and than any pause of a supervisor that lives.
_SILENT_FOR = datetime.timedelta(minutes=3)
# An orchestrator writes the entry, then asks for the pod, which may take a while to be answered.
_ASKING_FOR = datetime.timedelta(minutes=5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rental:
    """A machine of this store. why_end: the reason that nobody needs it; None where somebody does."""

    machine: Machine
    entry: LedgerEntry
    why_end: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swept:
    """What was ended, or found gone, and what it has cost."""

    entry: LedgerEntry
    why: str

    def describe(self) -> str:
        entry = self.entry
        return (
            f"ended {kind_of(entry)} {entry.machine or '?'} ({entry.stage} of {entry.model}, {entry.offer}): "
            f"{self.why}; ${entry.dollars():.2f}"
        )


def rentals(client: RunPodClient, store: ObjectStore) -> Iterator[Rental]:
    """Every pod and cluster that this store's ledger knows. Raises RunPodError."""
    for machine in list_machines(client):
        entry = read_entry(store, machine.token) if machine.token else None
        if entry is not None:
            yield Rental(machine=machine, entry=entry, why_end=_why_end(store, machine, entry))


def sweep(client: RunPodClient, store: ObjectStore) -> Iterator[Swept]:
    """End every machine that nobody needs, and close the entries of those that are gone.

    Raises RunPodError, and TimeoutError for one that will not go.
    """
    living = set()
    for rental in rentals(client, store):
        living.add(rental.entry.token)
        if rental.why_end is None:
            continue
        if _is_twin(rental.machine, rental.entry):
            end_twin(client, store, rental.entry.token, rental.machine)
        else:
            end_machines(client, store, rental.entry.token, rental.entry.outcome or str(Failure.LOST))
        yield _accounted(client, store, rental.entry.token, rental.why_end)
    for entry in list(entries(store)):
        if entry.open and entry.token not in living and not _is_asked_for(store, entry, utc_now()):
            close_gone(store, entry, entry.outcome or str(Failure.LOST))
            yield _accounted(client, store, entry.token, "it was gone already")


def _why_end(store: ObjectStore, machine: Machine, entry: LedgerEntry) -> str | None:
    now = utc_now()
    if not entry.open:
        return f"its attempt is over ({entry.outcome})"
    if now > entry.deadline_at:
        return f"its deadline has passed ({entry.deadline_at:%Y-%m-%d %H:%M} UTC)"
    if machine.dead and machine.status != PodStatus.TERMINATED:
        return f"it has stopped ({machine.status}), and costs on"
    if _is_twin(machine, entry):
        return f"it is a twin of {entry.machine}: its creation was answered with an error"
    told = EventStream(store, f"{attempt_prefix(entry.prefix, entry.token)}/events.jsonl").all()
    ended = ending_of(told)
    if ended and now - _time(ended["time"]) > _SILENT_FOR:
        return "its attempt has ended, and it has not ended itself"
    watch = read_lease(store, f"{entry.prefix}/watch.json")
    watched = watch is not None and not _silent(watch, now)
    if watched or _is_asked_for(store, entry, now):
        return None
    return "nobody has its lease, and nobody watches it"


def _is_asked_for(store: ObjectStore, entry: LedgerEntry, now: datetime.datetime) -> bool:
    """Whether an orchestrator may be asking for the attempt's machine just now, or its supervisor works."""
    lease = read_lease(store, f"{entry.prefix}/lease.json")
    owned = lease is not None and lease.token == entry.token and not _silent(lease, now)
    return owned or now - entry.asked_at < _ASKING_FOR


def _is_twin(machine: Machine, entry: LedgerEntry) -> bool:
    return entry.open and entry.machine not in (None, machine.id)


def _silent(lease: Lease, now: datetime.datetime) -> bool:
    return lease.released or now - lease.expires_at > _SILENT_FOR


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _bills(client: RunPodClient, machine: str, entry: LedgerEntry) -> Sequence[Billing]:
    if kind_of(entry) == "pod":
        return client.billing_pods(entry.asked_at, entry.ended_at, pod_id=machine)
    return client.billing_clusters(entry.asked_at, entry.ended_at, cluster_id=machine)


def _accounted(client: RunPodClient, store: ObjectStore, token: str, why: str) -> Swept:
    """The entry, with RunPod's own figure where it has one: nobody looked when the pod ended."""
    entry = read_entry(store, token)
    assert entry is not None
    if entry.machine is None or entry.ended_at is None:
        return Swept(entry=entry, why=why)
    try:
        bills = _bills(client, entry.machine, entry)
    except RunPodError:
        bills = []  # our own count stands, which is never less
    # A bill that does not reach to the end yet would be too low.
    if bills and max(bill.end_time for bill in bills) >= entry.ended_at:
        billed, ended_at = sum(bill.total_usd for bill in bills), entry.ended_at

        def note(now: LedgerEntry) -> dict[str, float]:
            return {"billed_usd": billed + sum(now.twins.values())} if now.ended_at == ended_at else {}

        entry = change_entry(store, token, note) or entry
    return Swept(entry=entry, why=why)
