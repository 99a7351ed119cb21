"""Midtraining: the mixture, the plan, the run."""

import dagster as dg

from dagster_nanochat.conversation_data import conversation_data_result
from dagster_nanochat.defs.base.assets import base_model_checkpoint
from dagster_nanochat.guards import StageConfig
from dagster_nanochat.partitions import model_partitions, shards_to_models
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.stage_assets import plan_result, training_result


@dg.asset(
    partitions_def=model_partitions,
    group_name="midtraining",
    # Some tasks take their words and questions from the model's own training text.
    deps=[
        dg.AssetDep("training_files", partition_mapping=shards_to_models),
        "tokenizer_training",  # counts the tokens
    ],
    kinds={"python"},
    tags={"stage": "midtrain"},
    code_version="1",
)
def midtraining_datasets(
    context: dg.AssetExecutionContext, config: StageConfig, store: StoreResource
) -> dg.MaterializeResult:
    """The mixture of conversations that midtraining reads, as JSONL in the store."""
    return conversation_data_result(context, "midtrain_data", config, store)


@dg.asset(
    partitions_def=model_partitions,
    group_name="midtraining",
    deps=[midtraining_datasets, base_model_checkpoint],
    kinds={"python"},
    tags={"stage": "midtrain"},
)
def midtraining_run_config(
    context: dg.AssetExecutionContext, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """The plan of midtraining."""
    return plan_result(context, "midtrain", store, launcher)


@dg.asset(
    partitions_def=model_partitions,
    group_name="midtraining",
    deps=[midtraining_datasets, base_model_checkpoint, midtraining_run_config],
    kinds={"pytorch"},
    tags={"stage": "midtrain"},
    code_version="1",
)
def midtraining_checkpoint(
    context: dg.AssetExecutionContext, config: StageConfig, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """The base model after conversations, tool calls and multiple choice, every token in the loss."""
    return training_result(context, "midtrain", config, store, launcher)
