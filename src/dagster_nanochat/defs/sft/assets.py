"""Supervised fine-tuning: the mixture, the plan, the run."""

import dagster as dg

from dagster_nanochat.conversation_data import conversation_data_result
from dagster_nanochat.defs.midtraining.assets import midtraining_checkpoint
from dagster_nanochat.guards import StageConfig
from dagster_nanochat.inference_folder import show_inference_folder
from dagster_nanochat.partitions import model_partitions, shards_to_models
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.selection import required_recipe
from dagster_nanochat.stage_assets import plan_result, training_result


@dg.asset(
    partitions_def=model_partitions,
    group_name="sft",
    deps=[
        dg.AssetDep("training_files", partition_mapping=shards_to_models),
        "tokenizer_training",  # counts the tokens
    ],
    kinds={"python"},
    tags={"stage": "sft"},
    code_version="1",
)
def sft_datasets(
    context: dg.AssetExecutionContext, config: StageConfig, store: StoreResource
) -> dg.MaterializeResult:
    """The conversations and questions that fine-tuning reads, as JSONL in the store."""
    return conversation_data_result(context, "sft_data", config, store)


@dg.asset(
    partitions_def=model_partitions,
    group_name="sft",
    deps=[sft_datasets, midtraining_checkpoint],
    kinds={"python"},
    tags={"stage": "sft"},
)
def sft_run_config(
    context: dg.AssetExecutionContext, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """The plan of fine-tuning."""
    return plan_result(context, "sft", store, launcher)


@dg.asset(
    partitions_def=model_partitions,
    group_name="sft",
    deps=[sft_datasets, midtraining_checkpoint, sft_run_config],
    kinds={"pytorch"},
    tags={"stage": "sft"},
    code_version="1",
)
def sft_checkpoint(
    context: dg.AssetExecutionContext, config: StageConfig, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """The chat model: fine-tuned on what an assistant says."""
    result = training_result(context, "sft", config, store, launcher)
    recipe = required_recipe(context)
    if recipe.sft is not None:  # else the model may still have a receipt of a time when it was not off
        show_inference_folder(recipe, store.open())
    return result
