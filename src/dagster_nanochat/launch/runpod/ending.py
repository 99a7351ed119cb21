"""The end of pods: asked for until it is seen, and what they have cost noted in the ledger."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.launch.runpod.models import Pod
from nanochat import pod as in_pod
from nanochat.store import ObjectStore
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import utc_now
from nanochat.store.ledger import LedgerEntry, change_entry

CONSOLE_URL = "https://console.runpod.io/pods?id={}"

_NAME = re.compile(r"nanochat-.*?(?P<token>\d{8}T\d{6}-[0-9a-f]{8})")
_GONE_WITHIN_S = 120.0
# A pod that has found its attempt made by another ends itself.
_TWIN_ENDS_WITHIN = timedelta(minutes=2)


def pod_token(pod: Pod) -> str | None:
    """The attempt that a pod is named after, if it is one of ours."""
    found = _NAME.fullmatch(pod.name)
    return found["token"] if found else None


def end_pods(
    client: RunPodClient, store: ObjectStore, token: str, outcome: str, known: Iterable[str] = ()
) -> None:
    """End every pod of an attempt, `known` and whatever else has its token, and see that they are gone.

    Then the attempt's entry in the ledger is closed, with what twins of its machine have cost. Raises
    TimeoutError that says how to end by hand what will not go.
    """
    seen: dict[str, Pod] = {}

    def living() -> list[str]:
        found = {pod.id: pod for pod in client.list_pods() if pod_token(pod) == token}
        if found.keys() - seen.keys():
            # Before they are ended: whoever ends them may be killed before the entry is closed.
            costs = {pod_id: _cost_so_far(pod) for pod_id, pod in found.items()}
            change_entry(store, token, lambda entry: {"twins": _without(entry.machine, entry.twins | costs)})
        seen.update(found)
        return [*found]

    _end(client, token, known, living)
    _close(store, token, outcome, seen)


def end_twin(client: RunPodClient, store: ObjectStore, token: str, twin: Pod) -> None:
    """End one pod of an attempt that another makes, and note what it has cost. Raises TimeoutError."""
    _end(client, token, [twin.id], list)
    change_entry(store, token, lambda entry: {"twins": {**entry.twins, twin.id: _cost_so_far(twin)}})


def _end(client: RunPodClient, token: str, known: Iterable[str], living: Callable[[], Iterable[str]]) -> None:
    """Delete pods until none is left of `known` and of what `living` finds, again and again."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    waiting = set(known)
    pause_s = 0.5
    problem: RunPodError | None = None
    while True:
        try:
            listed = set(living())
            waiting |= listed
            for pod_id in sorted(waiting):
                # A "not found" alone is not believed: what is listed is there.
                if client.get_pod(pod_id) is None and pod_id not in listed:
                    waiting.remove(pod_id)
                else:
                    client.delete_pod(pod_id)
            if not waiting:
                return
        except RunPodError as error:
            problem = error
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"pod {', '.join(sorted(waiting)) or '?'} of attempt {token} will not end"
                f"{f' ({problem})' if problem else ''}: end it in RunPod's console "
                f"({CONSOLE_URL.format(next(iter(waiting), ''))}) or with `nanochat pods sweep`, else it "
                "costs on"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _close(store: ObjectStore, token: str, outcome: str, ended: Mapping[str, Pod]) -> None:
    """Close the attempt's entry, or correct it where a pod was found after that. ended: the pods that it
    turned out to have had."""

    def close(entry: LedgerEntry) -> dict[str, Any]:
        attempt = attempt_prefix(entry.prefix, token)
        machine = entry.machine or in_pod.claimed_by(store, attempt) or next(iter(ended), None)
        # Those that ended themselves, and may have been seen by nobody.
        costs = {
            twin.machine: _usd(entry, twin.at + _TWIN_ENDS_WITHIN)
            for twin in in_pod.twins(store, attempt)
            if twin.machine not in ended
        }
        costs |= {pod_id: _cost_so_far(pod) for pod_id, pod in ended.items()}
        known: dict[str, Any] = {"machine": machine, "twins": _without(machine, entry.twins | costs)}
        if entry.open:
            known["outcome"] = outcome
        if entry.open or machine in ended:
            known |= {"ended_at": utc_now(), "billed_usd": None}
        return known

    change_entry(store, token, close)


def close_gone(store: ObjectStore, entry: LedgerEntry, outcome: str) -> None:
    """Close the entry of an attempt that has no pod any more, and may have had one that nobody saw."""
    change_entry(store, entry.token, lambda entry: {"in_doubt": entry.open or entry.in_doubt})
    _close(store, entry.token, outcome, {})


def _without(machine: str | None, costs: Mapping[str, float]) -> dict[str, float]:
    return {pod_id: usd for pod_id, usd in costs.items() if pod_id != machine}


def _usd(entry: LedgerEntry, until: datetime) -> float:
    return max(0.0, (until - entry.asked_at).total_seconds()) * entry.usd_per_h / 3600


def _cost_so_far(pod: Pod) -> float:
    if pod.created_at is None:
        return 0.0
    return max(0.0, (utc_now() - pod.created_at).total_seconds()) * (pod.usd_per_h or 0.0) / 3600
