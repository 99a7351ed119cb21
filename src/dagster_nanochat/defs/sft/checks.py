"""What the chat model knows, with the number of questions, the chance level and an interval."""

import dagster as dg

from dagster_nanochat.checkpoint_checks import accuracy_result, check_receipt
from dagster_nanochat.defs.sft.assets import sft_checkpoint
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe


@dg.asset_check(asset=sft_checkpoint, partitions_def=model_partitions)
def sft_mmlu_accuracy(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """Accuracy on MMLU's test questions (quick: on questions of the same form made from its corpus)."""
    recipe = required_recipe(context)
    least = recipe.evaluation.min_mmlu_accuracy
    return check_receipt(store.open(), recipe, "sft", lambda receipt: accuracy_result(receipt, "mmlu", least))


@dg.asset_check(asset=sft_checkpoint, partitions_def=model_partitions)
def sft_arc_easy_accuracy(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Accuracy on ARC-Easy's test questions (quick: on questions of the same form made from its corpus)."""
    recipe = required_recipe(context)
    least = recipe.evaluation.min_arc_easy_accuracy
    return check_receipt(
        store.open(), recipe, "sft", lambda receipt: accuracy_result(receipt, "arc_easy", least)
    )
