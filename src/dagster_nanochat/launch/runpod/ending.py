"""The end of what is rented: asked for until it is seen, and what it has cost noted in the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.launch.runpod.machines import (
    Kind,
    Machine,
    console_url,
    delete_machine,
    find_machine,
    list_machines,
)
from nanochat import pod as in_pod
from nanochat.store import ObjectStore
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import utc_now
from nanochat.store.ledger import LedgerEntry, change_entry

_GONE_WITHIN_S = 120.0
# A machine that has found its attempt made by another ends itself.
_TWIN_ENDS_WITHIN = timedelta(minutes=2)


def end_machines(
    client: RunPodClient,
    store: ObjectStore,
    token: str,
    outcome: str,
    known: Mapping[str, Kind] | None = None,
) -> None:
    """End every machine of an attempt, `known` (by id) and whatever else has its token, and see that they are
    gone.

    Then the attempt's entry in the ledger is closed, with what twins of its machine have cost. Raises
    TimeoutError that says how to end by hand what will not go.
    """
    seen: dict[str, Machine] = {}

    def living() -> list[Machine]:
        found = {machine.id: machine for machine in list_machines(client) if machine.token == token}
        if found.keys() - seen.keys():
            # Before they are ended: whoever ends them may be killed before the entry is closed.
            change_entry(
                store,
                token,
                lambda entry: {"twins": _without(entry.machine, entry.twins | _costs(found, entry))},
            )
        seen.update(found)
        return [*found.values()]

    _end(client, token, known or {}, living)
    _close(store, token, outcome, seen)


def end_twin(client: RunPodClient, store: ObjectStore, token: str, twin: Machine) -> None:
    """End one machine of an attempt that another makes, and note what it has cost. Raises TimeoutError."""
    _end(client, token, {twin.id: twin.kind}, list)
    change_entry(store, token, lambda entry: {"twins": {**entry.twins, twin.id: _cost_so_far(twin, entry)}})


def _end(
    client: RunPodClient, token: str, known: Mapping[str, Kind], living: Callable[[], Iterable[Machine]]
) -> None:
    """Delete machines until none is left of `known` and of what `living` finds, again and again."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    waiting = dict(known)
    pause_s = 0.5
    problem: RunPodError | None = None
    while True:
        try:
            listed = {machine.id: machine for machine in living()}
            waiting |= {machine.id: machine.kind for machine in listed.values()}
            for id, kind in sorted(waiting.items()):
                # A "not found" alone is not believed: what is listed is there.
                if find_machine(client, kind, id) is None and id not in listed:
                    del waiting[id]
                else:
                    delete_machine(client, kind, id, listed.get(id))
            if not waiting:
                return
        except RunPodError as error:
            problem = error
        if time.monotonic() > deadline:
            names = ", ".join(f"{kind} {id}" for id, kind in sorted(waiting.items())) or "pod ?"
            url = next((console_url(kind, id) for id, kind in waiting.items()), console_url("pod", ""))
            raise TimeoutError(
                f"{names} of attempt {token} will not end{f' ({problem})' if problem else ''}: end it in "
                f"RunPod's console ({url}) or with `nanochat pods sweep`, else it costs on"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _close(store: ObjectStore, token: str, outcome: str, ended: Mapping[str, Machine]) -> None:
    """Close the attempt's entry, or correct it where a machine was found after that. ended: the machines that
    it turned out to have had."""
    # A cluster's members name themselves after its group.
    ids = {machine.group: id for id, machine in ended.items() if machine.group}

    def close(entry: LedgerEntry) -> dict[str, Any]:
        attempt = attempt_prefix(entry.prefix, token)
        claimed = in_pod.claimed_by(store, attempt)
        machine = entry.machine or ids.get(claimed or "", claimed) or next(iter(ended), None)
        # Those that ended themselves, and may have been seen by nobody.
        costs = {
            twin.machine: _usd(entry, twin.at + _TWIN_ENDS_WITHIN)
            for twin in in_pod.twins(store, attempt)
            if ids.get(twin.machine, twin.machine) not in ended
        }
        costs |= _costs(ended, entry)
        known: dict[str, Any] = {"machine": machine, "twins": _without(machine, entry.twins | costs)}
        if entry.open:
            known["outcome"] = outcome
        if entry.open or machine in ended:
            known |= {"ended_at": utc_now(), "billed_usd": None}
        return known

    change_entry(store, token, close)


def close_gone(store: ObjectStore, entry: LedgerEntry, outcome: str) -> None:
    """Close the entry of an attempt that has no machine any more, and may have had one that nobody saw."""
    change_entry(store, entry.token, lambda entry: {"in_doubt": entry.open or entry.in_doubt})
    _close(store, entry.token, outcome, {})


def _without(machine: str | None, costs: Mapping[str, float]) -> dict[str, float]:
    return {id: usd for id, usd in costs.items() if id != machine}


def _usd(entry: LedgerEntry, until: datetime) -> float:
    return max(0.0, (until - entry.asked_at).total_seconds()) * entry.usd_per_h / 3600


def _costs(machines: Mapping[str, Machine], entry: LedgerEntry) -> dict[str, float]:
    return {id: _cost_so_far(machine, entry) for id, machine in machines.items()}


def _cost_so_far(machine: Machine, entry: LedgerEntry) -> float:
    if machine.created_at is None:
        return _usd(entry, utc_now())
    hours = max(0.0, (utc_now() - machine.created_at).total_seconds()) / 3600
    return hours * (machine.usd_per_h or entry.usd_per_h)
