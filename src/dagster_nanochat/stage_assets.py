"""What the assets of the three training stages have in common: a plan, a run, a materialization."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from dagster_nanochat.guards import StageConfig
from dagster_nanochat.launch.base import Request
from dagster_nanochat.lifecycle import BuiltStage, train_stage
from dagster_nanochat.metadata import receipt_metadata
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.selection import required_recipe
from dagster_nanochat.stage_attempt import attempt_rows
from dagster_nanochat.views import show_checkpoint
from nanochat.export.markdown import table
from nanochat.failures import AttemptFailed
from nanochat.plan import plan_stage
from nanochat.recipes import Recipe
from nanochat.stages import resolve
from nanochat.store import ObjectStore, StoreError
from nanochat.store.layout import stage_prefix


@contextlib.contextmanager
def _store_faults_by_name(what: str) -> Iterator[None]:
    """A store that cannot be used ends the run with its own words, and nothing has been rented."""
    try:
        yield
    except StoreError as error:
        raise dg.Failure(f"{what}: {error}", allow_retries=False) from error


def plan_result(
    context: dg.AssetExecutionContext, stage: str, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """Materialize a stage's plan: what it will take here, and whether it is fresh already."""
    recipe = required_recipe(context)
    opened = store.open()
    with _store_faults_by_name(f"the plan of {stage} of {recipe.name}"):
        return _plan_result(context, stage, recipe, opened, launcher)


def _plan_result(
    context: dg.AssetExecutionContext,
    stage: str,
    recipe: Recipe,
    opened: ObjectStore,
    launcher: LauncherResource,
) -> dg.MaterializeResult:
    states = resolve(recipe, opened)
    if stage not in states:
        return switched_off(context, stage, recipe.name)
    work = plan_stage(recipe, stage, states, opened)
    try:
        offers = launcher.create(opened, hardware=recipe.hardware).offers(
            Request.of(recipe.hardware), work.flops
        )
    except AttemptFailed as error:
        raise dg.Failure(f"{stage} of {recipe.name}: {error}", allow_retries=False) from error
    best = offers[0]
    plan = best.priced(work)
    hours = "?" if plan.hours is None else f"{plan.hours:.2f} h"
    context.log.info(f"{stage}: plan: {plan.steps} steps, {plan.tokens or 0:,} tokens, about {hours}")
    shown = {
        name: value
        for name, value in plan.model_dump(mode="json").items()
        if isinstance(value, int | float | str)
    }
    return dg.MaterializeResult(
        metadata={
            **shown,
            "parameters_and_settings": dg.MetadataValue.json(plan.section),
            "offers": dg.MetadataValue.md(table([offer.row(plan.flops) for offer in offers])),
            "reasons": dg.MetadataValue.md("\n".join(f"- {reason}" for reason in plan.reasons) or "(none)"),
            "needs": dg.MetadataValue.md("\n".join(f"- {need}" for need in plan.needs) or "(nothing)"),
        },
        data_version=dg.DataVersion(plan.fingerprint) if plan.fingerprint else None,
    )


def training_result(
    context: dg.AssetExecutionContext,
    stage: str,
    config: StageConfig,
    store: StoreResource,
    launcher: LauncherResource,
) -> dg.MaterializeResult:
    """Materialize a training stage: build it or find it fresh."""
    recipe = required_recipe(context)
    opened = store.open()
    with _store_faults_by_name(f"{stage} of {recipe.name}"):
        if stage not in resolve(recipe, opened):
            return switched_off(context, stage, recipe.name)
        machines = launcher.create(opened, hardware=recipe.hardware, settings=config.runpod)
    built = train_stage(context, stage, recipe, opened, machines, config)
    folder = show_checkpoint(opened, built.receipt, recipe.name)
    extra: dict[str, Any] = {"folder": str(folder)}
    rows = list(attempt_rows(opened, stage_prefix(stage, built.fingerprint)))
    if len(rows) > 1:
        extra["attempts"] = dg.MetadataValue.md(table(rows))
    return built_result(context, built, model=recipe.name, store=store, extra=extra)


def built_result(
    context: dg.AssetExecutionContext,
    built: BuiltStage,
    *,
    model: str,
    store: StoreResource,
    extra: Mapping[str, Any] | None = None,
) -> dg.MaterializeResult:
    """A stage's materialization, from its receipt."""
    context.log.info(built.summary)
    return dg.MaterializeResult(
        metadata={
            **(extra or {}),
            **receipt_metadata(store.open(), built.receipt, model=model, reused=not built.built),
        },
        data_version=dg.DataVersion(built.fingerprint),
    )


def switched_off(context: dg.AssetExecutionContext, stage: str, model: str) -> dg.MaterializeResult:
    """The recipe has no such stage: say so, build nothing."""
    context.log.info(f"{stage}: switched off in the recipe of {model}")
    return dg.MaterializeResult(metadata={"switched_off": True})
