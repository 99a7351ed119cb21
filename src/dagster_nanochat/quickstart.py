"""`nanochat quickstart`: the whole graph for one model through Dagster, told line by line."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from rich.table import Table

from dagster_nanochat.console import LOGGER
from dagster_nanochat.guards import FORCE_TAG, stages_named
from dagster_nanochat.reporting import find_recipe
from nanochat.data.sources import get_source
from nanochat.export.markdown import number
from nanochat.recipes import Recipe
from nanochat.stages import STAGES, resolve
from nanochat.store import open_store

# Asset → the name its stage has in the summary.
_STAGE_LINES = {
    "tokenizer_training": "tokenizer",
    "base_model_checkpoint": "base",
    "midtraining_checkpoint": "midtrain",
    "sft_checkpoint": "sft",
}


# Counts behind a rate, and what the plan has said before: in the report, not in the table.
_DETAILS = (
    "_correct",
    "_questions",
    "_skipped",
    "skipped_batches",
    "flops",
    "parameters",
    "dollars",
    "epochs",
)


def run_quickstart(model: str, *, force: str, question: str) -> int:
    """Exit code 0 with an answer, 1 with the reason on standard error. `force`: stages, or nothing.

    Raises ValueError for stages or a store that there is not, StoreError for a store that is no use.
    """
    recipe = find_recipe(model)
    if recipe is None:
        return 1
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So does a script start what is behind its `&`. Dagster would take over the same for SIGTERM, and
        # wait a minute for the end of its own helpers after every run.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    off = [stage for stage in stages_named(force) if not STAGES[stage].enabled(recipe)]
    if off and force != "all":
        raise ValueError(f"--stages: {', '.join(sorted(off))} is switched off in the recipe of {model}")
    resolve(recipe, open_store())  # a store that cannot be read is told before anything starts
    home = os.environ.get("DAGSTER_HOME")
    if home:
        Path(home).mkdir(parents=True, exist_ok=True)
    # Dagster's notes to developers about its own preview features are not for this terminal.
    warnings.filterwarnings("ignore", category=dg.PreviewWarning)
    warnings.filterwarnings("ignore", category=dg.BetaWarning)
    from dagster_nanochat.definitions import defs

    definitions = defs()
    start = time.monotonic()
    with dg.DagsterInstance.get() if home else dg.DagsterInstance.ephemeral() as instance:
        if instance.is_ephemeral:
            print(
                "warning: DAGSTER_HOME is not set, so Dagster keeps no history of this run", file=sys.stderr
            )
        tags = {FORCE_TAG: force} if force else {}
        ingested = _run(definitions, "ingest_shards", instance, _shard_tags(recipe), {})
        if not ingested.success:
            return _explain(ingested, instance)
        config = {"ops": {"chat_inference": {"config": {"question": question}}}}
        trained = _run(definitions, "model_training", instance, {"dagster/partition": model, **tags}, config)
        if not trained.success:
            return _explain(trained, instance)
    _summarise(trained, recipe, seconds=time.monotonic() - start)
    return 0


def _shard_tags(recipe: Recipe) -> dict[str, str]:
    shards = get_source(recipe.data.source).training_shards()[: recipe.data.shards]
    return {
        "dagster/asset_partition_range_start": shards[0],
        "dagster/asset_partition_range_end": shards[-1],
    }


def _run(
    definitions: dg.Definitions,
    job: str,
    instance: dg.DagsterInstance,
    tags: Mapping[str, str],
    config: Mapping[str, Any],
) -> dg.ExecuteInProcessResult:
    return definitions.resolve_job_def(job).execute_in_process(
        instance=instance,
        tags=tags,
        run_config={"loggers": {LOGGER: {}}, **config},
        raise_on_error=False,
    )


def _explain(result: dg.ExecuteInProcessResult, instance: dg.DagsterInstance) -> int:
    run = instance.get_run_by_id(result.run_id)
    if run is not None and run.status is dg.DagsterRunStatus.CANCELED:
        print(
            f"run {result.run_id} was terminated; the same command goes on from where it was", file=sys.stderr
        )
        return 1
    for event in result.all_events:
        if event.is_step_failure:
            failure = event.step_failure_data
            if failure.error and failure.error.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                print(
                    f"interrupted at {event.step_key}; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                )
                return 1
            reason = (failure.user_failure_data.description if failure.user_failure_data else None) or (
                failure.error.message if failure.error else "unknown"
            )
            print(f"error: {event.step_key}: {reason}", file=sys.stderr)
    print(f"error: run {result.run_id} failed; see it in `dg dev`", file=sys.stderr)
    return 1


def _materializations(result: dg.ExecuteInProcessResult) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for event in result.all_events:
        if event.is_step_materialization and event.asset_key:
            metadata = event.materialization.metadata
            found[event.asset_key.to_user_string()] = {
                name: getattr(value, "value", None) for name, value in metadata.items()
            }
    return found


def _summarise(result: dg.ExecuteInProcessResult, recipe: Recipe, *, seconds: float) -> None:
    console = Console(highlight=False, soft_wrap=True)
    made = _materializations(result)
    table = Table("metric", "value", title=f"{recipe.name}: what was measured", title_justify="left")
    for asset in _STAGE_LINES:
        for name, value in made.get(asset, {}).items():
            if isinstance(value, float | int) and not isinstance(value, bool) and not name.endswith(_DETAILS):
                table.add_row(f"{_STAGE_LINES[asset]} · {name}", number(value))
    console.print(table)
    failed_checks = [
        evaluation for evaluation in result.get_asset_check_evaluations() if not evaluation.passed
    ]
    for evaluation in failed_checks:
        console.print(f"check {evaluation.check_name} did not pass: {evaluation.description}")
    console.print(f"report: {made['model_report']['path']}")
    console.print(f"all of it: {seconds:.0f} s")
    chat = made["chat_inference"]
    if made["serverless_endpoint"].get("deployed"):
        _tell_endpoint(console, made["serverless_endpoint"], chat, recipe.name)
    for asset, stage in _STAGE_LINES.items():
        metadata = made.get(asset, {})
        if metadata.get("switched_off"):
            console.print(f"{stage}: switched off")
        elif metadata.get("reused"):
            console.print(f"{stage}: fresh (receipt {metadata['receipt'][:6]}…)")
        else:
            console.print(f"{stage}: built in {metadata['seconds']:.0f} s")
    answer = chat.get("answer", "(none: the model has no stage to chat with)")
    console.print(f"answer: {answer}", markup=False)


def _tell_endpoint(
    console: Console, endpoint: Mapping[str, Any], chat: Mapping[str, Any], model: str
) -> None:
    """Where the answer came from, what is there now, what it costs, and how to be rid of it."""
    price = endpoint.get("usd_per_h_of_a_worker")
    costs = "" if price is None else f", at most ${price:.2f} an hour each while they are there"
    console.print(
        f"endpoint: {endpoint['endpoint']} ({endpoint['id']}), {endpoint['workers']} workers{costs}; "
        f"remove it with `nanochat endpoints rm {model}`",
        markup=False,
    )
    cost = f", ${chat['dollars']:.5f}" if "dollars" in chat else ""
    console.print(
        f"the answer comes from the serverless {chat['answered_by']}: {chat['seconds']:.1f} s"
        f"{' with a cold start' if chat['cold_start'] else ''}{cost}",
        markup=False,
    )
