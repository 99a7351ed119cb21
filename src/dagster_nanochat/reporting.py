"""`nanochat plan` and `nanochat status`: the store's view of a model, for people and programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from dagster_nanochat.launch.base import Request
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import resolve_settings
from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.launch.runpod.offers import find_offers
from nanochat.failures import AttemptFailed
from nanochat.machine import this_machine
from nanochat.plan import ModelPlan, StagePlan, plan_model
from nanochat.recipes import Recipe
from nanochat.stages import StageState, resolve
from nanochat.store import open_store


def find_recipe(model: str) -> Recipe | None:
    """The recipe, or None after saying on standard error which there are."""
    from dagster_nanochat.partitions import recipe_book

    book = recipe_book()
    for error in book.errors:
        print(f"warning: {error}", file=sys.stderr)
    try:
        return book[model]
    except KeyError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return None


def print_plan(model: str, *, as_json: bool, offers: bool = False) -> int:
    """Exit code 0, or 1 for an unknown model, or where RunPod has no offer. offers: ask RunPod's catalog
    what all of the model would cost there."""
    recipe = find_recipe(model)
    if recipe is None:
        return 1
    machine = this_machine()
    gpus = recipe.hardware.gpus
    plan = plan_model(
        recipe,
        open_store(),
        machine=machine.describe(gpus),
        flops_per_s=machine.training_flops_per_s(gpus),
    )
    try:
        rows = _offers(recipe, plan) if offers else None
    except (RunPodError, AttemptFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if as_json:
        document = plan.model_dump(mode="json")
        print(json.dumps(document if rows is None else {**document, "offers": rows}, indent=1))
        return 0
    _show_plan(plan, memory_bytes=machine.training_memory_bytes())
    if rows is not None:
        _show_offers(rows)
    return 0


def _offers(recipe: Recipe, plan: ModelPlan) -> list[dict[str, str | float | None]]:
    """RunPod's offers for all training stages of the model, the cheapest to finish first."""
    flops = sum(stage.flops or 0.0 for stage in plan.stages)
    with RunPodClient.from_environment() as client:
        found = find_offers(
            client, Request.of(recipe.hardware), resolve_settings(hardware=recipe.hardware), flops
        )
    return [offer.row(flops) for offer in found]


def _show_offers(rows: list[dict[str, str | float | None]]) -> None:
    console = _console()
    console.print("\nat RunPod, for all stages on one kind of machine (estimates):")
    table = Table(box=None, pad_edge=False)
    table.add_column("offer")
    for column in ("$/h", "hours", "$"):
        table.add_column(column, justify="right")
    table.add_column("stock")
    for row in rows:
        numbers = (row["usd_per_h"], row["hours"], row["usd"])
        table.add_row(str(row["offer"]), *(f"{float(n or 0):,.2f}" for n in numbers), str(row["stock"]))
    console.print(table)


def _console() -> Console:
    """Wide enough for the tables: a narrow terminal wraps lines, which beats cut numbers."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 130)
    return console


def _show_plan(plan: ModelPlan, *, memory_bytes: int) -> None:
    console = _console()
    console.print(f"[bold]{plan.model}[/bold]: {plan.description}")
    console.print(
        f"{plan.parameters:,} parameters, {plan.flops_per_token / 1e6:,.1f} MFLOPs a token, "
        f"{plan.kv_bytes_per_token:,} bytes of KV cache a token"
    )
    shards = f"{plan.shards_needed} shards of {plan.recipe['data']['source']}, validation included"
    console.print(f"{shards}: " + (f"{plan.shards_missing}" if plan.shards_missing else "all there"))
    console.print(
        f"on {plan.machine}: about {plan.machine_flops_per_s / 1e12:.2f} TFLOP/s of training (estimate)\n"
    )
    table = Table(box=None, pad_edge=False)
    for column in (
        "stage",
        "state",
        "steps",
        "tokens",
        "FLOPs",
        "hours here",
        "memory",
        "disk",
        "fingerprint",
    ):
        table.add_column(column, justify="left" if column in ("stage", "state", "fingerprint") else "right")
    for stage in plan.stages:
        guessed = "~" if stage.estimated else ""
        table.add_row(
            stage.stage,
            stage.status,
            "" if stage.steps is None else f"{guessed}{stage.steps:,}",
            "" if stage.tokens is None else f"{guessed}{_si(stage.tokens)}",
            "" if stage.flops is None else f"{stage.flops:.2g}",
            "" if stage.hours is None else _hours(stage.hours),
            "" if stage.memory_bytes is None else _gib(stage.memory_bytes),
            "" if stage.disk_bytes is None else _gib(stage.disk_bytes),
            (stage.fingerprint or "-")[:12],
        )
    console.print(table)
    _show_reasons(console, plan.stages)
    peak = max((stage.memory_bytes or 0 for stage in plan.stages), default=0)
    if peak > memory_bytes:
        console.print(
            f"\nThis machine has {_gib(memory_bytes)} of memory, the plan wants {_gib(peak)}: "
            "it will not fit with this device batch."
        )


def _show_reasons(console: Console, stages: tuple[StagePlan, ...]) -> None:
    """Each reason once, with the stages that have it."""
    having: dict[str, list[str]] = {}
    for stage in stages:
        for reason in stage.reasons:
            having.setdefault(reason, []).append(stage.stage)
    for reason, names in having.items():
        console.print(f"  {', '.join(names)}: {reason}")


def _si(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:,.1f} h"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def print_status(model: str, *, as_json: bool) -> int:
    """Exit code 0, or 1 for an unknown model."""
    recipe = find_recipe(model)
    if recipe is None:
        return 1
    rows = [_status_row(name, state) for name, state in resolve(recipe, open_store()).items()]
    if as_json:
        print(json.dumps({"model": model, "stages": rows}, indent=1))
        return 0
    console = _console()
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "fingerprint", "receipt", "built", "seconds", "dollars"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["stage"],
            row["status"],
            (row["fingerprint"] or "-")[:12],
            (row["receipt"] or "-")[:12],
            (row["built_at"] or "-")[:16].replace("T", " "),
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            "" if row["dollars"] is None else f"{row['dollars']:.2f}",
        )
    console.print(table)
    for row in rows:
        for reason in row["reasons"]:
            console.print(f"  {row['stage']}: {reason}")
    return 0


def _status_row(name: str, state: StageState) -> dict[str, Any]:
    receipt = state.receipt
    return {
        "stage": name,
        "status": state.status.value,
        "reasons": list(state.reasons),
        "fingerprint": state.fingerprint,
        "receipt": receipt.digest() if receipt else None,
        "built_at": receipt.created_at.isoformat() if receipt else None,
        "seconds": receipt.seconds if receipt else None,
        "dollars": receipt.dollars if receipt else None,
        "owner": state.lease.describe() if state.lease else None,
        "lease_expires_at": state.lease.expires_at.isoformat() if state.lease else None,
        "metrics": receipt.metrics if receipt else {},
    }
