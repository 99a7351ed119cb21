"""`nanochat endpoints`: which models are served, what that has cost, a question to one, and its end."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from dagster_nanochat.launch.runpod.asking import ask
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.deployment import (
    always_paid,
    endpoint_records,
    forget_endpoint,
    remove_endpoint,
    store_of,
)
from dagster_nanochat.launch.runpod.endpoint_models import Endpoint
from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.pods import with_runpod
from nanochat.failures import AttemptFailed
from nanochat.store import ObjectStore

_GONE_WITHIN_S = 60.0


def list_endpoints() -> int:
    """Exit code 0, or 1 where RunPod does not answer."""
    return with_runpod(_list)


def remove(model_or_id: str) -> int:
    """Exit code 0 once the endpoint is gone, 1 where there is no such one of ours, or it will not go."""
    return with_runpod(lambda client, store: _remove(client, store, model_or_id))


def ask_endpoint(model: str, question: dict[str, Any], *, within_s: float) -> int:
    """Exit code 0 with the answer on standard output, else 1 with the reason on standard error."""
    return with_runpod(lambda client, store: _ask(client, store, model, question, within_s))


def _list(client: RunPodClient, store: ObjectStore) -> int:
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 160)
    table = Table(box=None, pad_edge=False)
    for column in ("endpoint", "id", "model", "workers", "now", "$/h of one", "since", "this month"):
        table.add_column(column, justify="right" if column in ("$/h of one", "this month") else "left")
    records = {record.id: record for record in endpoint_records(store)}
    billed = _billed(client)
    notes = []
    for endpoint in _ours(client, store):
        record = records.pop(endpoint.id, None)
        there = client.endpoint_workers(endpoint.id).workers
        limits = endpoint.workers
        table.add_row(
            endpoint.name,
            endpoint.id,
            record.model if record else "?",
            f"{limits.min} to {limits.max}",
            ", ".join(sorted(str(worker.status) for worker in there)) or "none",
            f"{record.usd_per_h:.2f}" if record and record.usd_per_h else "?",
            f"{endpoint.created_at:%Y-%m-%d %H:%M} UTC" if endpoint.created_at else "?",
            "?" if billed is None else f"${billed.get(endpoint.id, 0.0):.2f}",
        )
        if record is None:
            notes.append(f"{endpoint.name} ({endpoint.id}) has never answered its smoke prompt")
    if table.row_count:
        console.print(table)
    else:
        console.print(f"no model of {store.url} has an endpoint")
    for record in records.values():
        notes.append(
            f"{record.name} ({record.id}) of {record.model} is gone from RunPod: deploy it anew, or forget "
            f"it with `nanochat endpoints rm {record.model}`"
        )
    for note in (*notes, *always_paid(client, store)):
        console.print(note, markup=False)
    return 0


def _billed(client: RunPodClient) -> dict[str, float] | None:
    """USD of each endpoint since the month began; None where RunPod does not tell."""
    start = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    totals: dict[str, float] = {}
    try:
        for bill in client.billing_serverless(start):
            totals[bill.serverless_id] = totals.get(bill.serverless_id, 0.0) + bill.total_usd
    except RunPodError as error:
        print(f"warning: what they have cost is not told: {error}", file=sys.stderr)
        return None
    return totals


def _ours(client: RunPodClient, store: ObjectStore) -> list[Endpoint]:
    return [endpoint for endpoint in client.list_endpoints() if store_of(endpoint) == store.url]


def _remove(client: RunPodClient, store: ObjectStore, model_or_id: str) -> int:
    records = [
        record for record in endpoint_records(store) if model_or_id in (record.model, record.id, record.name)
    ]
    ours = {endpoint.id: endpoint.name for endpoint in _ours(client, store)}
    named = {id: name for id, name in ours.items() if model_or_id in (id, name)}
    named |= {record.id: record.name for record in records}
    for id, name in named.items():
        if id in ours:
            remove_endpoint(client, id, within_s=_GONE_WITHIN_S)
            print(f"endpoint {name} ({id}) is gone, with its workers and its queue")
        else:
            print(f"endpoint {name} ({id}) was gone already")
    for record in records:
        forget_endpoint(store, record.model)
    if named:
        return 0
    print(
        f"error: no endpoint of {store.url} is called {model_or_id}; see `nanochat endpoints ls`",
        file=sys.stderr,
    )
    return 1


def _ask(
    client: RunPodClient, store: ObjectStore, model: str, question: dict[str, Any], within_s: float
) -> int:
    record = next((record for record in endpoint_records(store) if record.model == model), None)
    endpoint = client.get_endpoint(record.id) if record else None
    if endpoint is None:
        print(
            f"error: {model} has no endpoint; `dg launch --job deploy_model --partition {model}` makes one",
            file=sys.stderr,
        )
        return 1
    heard: list[str] = []

    def hear(piece: Any) -> None:
        text = piece.get("text") if isinstance(piece, dict) else None
        if text:
            heard.append(text)
            print(text, end="", flush=True)

    try:
        answer = ask(
            client,
            endpoint,
            {**question, "stream": True},
            within_s=within_s,
            pause=time.sleep,
            say=lambda words: print(words, file=sys.stderr),
            hear=hear,
        )
    except AttemptFailed as error:
        print(f"{chr(10) if heard else ''}error: {error}", file=sys.stderr)
        return 1
    print(answer.text.removeprefix("".join(heard)))
    cost = "" if answer.usd is None else f", ${answer.usd:.5f}"
    print(f"({answer.tokens} tokens in {answer.seconds:.1f} s{cost})", file=sys.stderr)
    return 0
