"""Is the base model good enough to build on?"""

import dagster as dg

from dagster_nanochat.checkpoint_checks import check_receipt
from dagster_nanochat.defs.base.assets import base_model_checkpoint
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe
from nanochat.recipes import Recipe
from nanochat.store.receipts import Receipt


@dg.asset_check(asset=base_model_checkpoint, partitions_def=model_partitions)
def base_val_bpb(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """Validation bits per byte, beside the n-gram models and compressors where they were measured."""
    recipe = required_recipe(context)
    return check_receipt(store.open(), recipe, "base", lambda receipt: _bpb_result(receipt, recipe))


def _bpb_result(receipt: Receipt, recipe: Recipe) -> dg.AssetCheckResult:
    bpb = receipt.metrics["val_bpb"]
    most = recipe.evaluation.max_val_bpb
    bigram = receipt.metrics.get("bigram_bpb")
    beside = f", {1 - bpb / bigram:.0%} below a Kneser–Ney bigram" if bigram else ""
    if most is None:
        passed, wanted = True, "no threshold in the recipe"
    else:
        passed, wanted = bpb <= most, f"at most {most:g} wanted"
    return dg.AssetCheckResult(
        passed=passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{bpb:.4f} bits a byte{beside}; {wanted}",
        metadata={
            "val_bpb": bpb,
            **({"wanted": most} if most is not None else {}),
            **{name: value for name, value in receipt.metrics.items() if name.endswith("_bpb")},
        },
    )
