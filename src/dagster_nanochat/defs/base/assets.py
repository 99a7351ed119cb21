"""Pretraining: the plan, then the run."""

import dagster as dg

from dagster_nanochat.guards import StageConfig
from dagster_nanochat.partitions import model_partitions, shards_to_models
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.stage_assets import plan_result, training_result

SHARDS = dg.AssetDep("training_files", partition_mapping=shards_to_models)


@dg.asset(
    partitions_def=model_partitions,
    group_name="base",
    deps=[SHARDS, "validation_files", "tokenizer_training"],
    kinds={"python"},
    tags={"stage": "base"},
)
def model_run_config(
    context: dg.AssetExecutionContext, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """The plan of pretraining: resolved settings, tokens, FLOPs, memory, hours, offers, freshness."""
    return plan_result(context, "base", store, launcher)


@dg.asset(
    partitions_def=model_partitions,
    group_name="base",
    deps=[SHARDS, "validation_files", "tokenizer_training", model_run_config],
    kinds={"pytorch"},
    tags={"stage": "base"},
    code_version="1",
)
def base_model_checkpoint(
    context: dg.AssetExecutionContext, config: StageConfig, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """The pretrained model: predicts the next token of the source's text."""
    return training_result(context, "base", config, store, launcher)
