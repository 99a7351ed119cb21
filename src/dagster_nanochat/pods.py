"""`nanochat pods`: what is rented, by whom and for how much, and the end of it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.deployment import always_paid
from dagster_nanochat.launch.runpod.ending import end_machines
from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.launch.runpod.sweeper import rentals, sweep
from nanochat.failures import Failure
from nanochat.store import ObjectStore, open_store
from nanochat.store.leases import utc_now
from nanochat.store.ledger import entries


def list_pods() -> int:
    """Exit code 0, or 1 where RunPod does not answer."""
    return with_runpod(_list)


def remove_pod(token_or_id: str) -> int:
    """Exit code 0 once the pod is gone, 1 where there is no such one of ours, or it will not go."""
    return with_runpod(lambda client, store: _remove(client, store, token_or_id))


def sweep_pods() -> int:
    """Exit code 0, or 1 where a pod will not go."""
    return with_runpod(_sweep)


def with_runpod(command: Callable[[RunPodClient, ObjectStore], int]) -> int:
    """The command's exit code, or 1 where RunPod refuses or does not do what it is asked."""
    store = open_store()
    try:
        with RunPodClient.from_environment() as client:
            return command(client, store)
    except (RunPodError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _list(client: RunPodClient, store: ObjectStore) -> int:
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 160)
    table = Table(box=None, pad_edge=False)
    for column in (
        "pod or cluster",
        "model",
        "stage",
        "attempt",
        "offer",
        "status",
        "since",
        "dollars",
        "by",
    ):
        table.add_column(column, justify="right" if column == "dollars" else "left")
    ownerless = []
    for rental in rentals(client, store):
        entry = rental.entry
        table.add_row(
            rental.machine.id,
            entry.model,
            entry.stage,
            entry.token,
            entry.offer,
            rental.machine.status,
            f"{entry.asked_at:%Y-%m-%d %H:%M} UTC",
            f"{entry.dollars():.2f}",
            f"{entry.user} on {entry.host}",
        )
        if rental.why_end:
            ownerless.append(f"nobody needs {rental.machine.id}: {rental.why_end}")
    if table.row_count:
        console.print(table)
    else:
        console.print(f"no pod of {store.url} is running")
    for note in ownerless:
        console.print(f"{note}. End it with `nanochat pods sweep`", markup=False)
    month = f"{utc_now():%Y-%m}"
    spent = sum(entry.dollars() for entry in entries(store, month))
    console.print(f"{month}: ${spent:.2f} in this store's ledger")
    return 0


def _remove(client: RunPodClient, store: ObjectStore, token_or_id: str) -> int:
    for rental in rentals(client, store):
        if token_or_id in (rental.machine.id, rental.entry.token):
            end_machines(client, store, rental.entry.token, str(Failure.CANCELLED))
            machine = rental.machine
            print(f"{machine.kind} {machine.id} ({rental.entry.stage} of {rental.entry.model}) is gone")
            return 0
    print(f"error: no pod of {store.url} is called {token_or_id}; see `nanochat pods ls`", file=sys.stderr)
    return 1


def _sweep(client: RunPodClient, store: ObjectStore) -> int:
    number = 0
    for swept in sweep(client, store):
        number += 1
        print(swept.describe())
    if not number:
        print("nothing to sweep: every pod of this store has an owner")
    for note in always_paid(client, store):
        print(note)
    return 0
