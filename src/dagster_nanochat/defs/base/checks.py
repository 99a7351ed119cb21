"""Is the base model good enough to build on?"""

import dagster as dg

from dagster_nanochat.checkpoint_checks import bpb_result, check_receipt
from dagster_nanochat.defs.base.assets import base_model_checkpoint
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe


@dg.asset_check(asset=base_model_checkpoint, partitions_def=model_partitions)
def base_val_bpb(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """Validation bits per byte, beside the n-gram models and compressors where they were measured."""
    recipe = required_recipe(context)
    return check_receipt(store.open(), recipe, "base", lambda receipt: bpb_result(receipt, recipe))
