"""Checks of trained models: they compare a receipt's metrics with the recipe's thresholds.

The measuring is done where the model is, during and at the end of its stage; a check reads the
receipt of its own partition's model.
"""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg

from nanochat.evaluation.intervals import wilson
from nanochat.recipes import Recipe
from nanochat.stages import STAGES
from nanochat.store import ObjectStore
from nanochat.store.receipts import Receipt, current_receipt


def check_receipt(
    store: ObjectStore, recipe: Recipe, stage: str, judge: Callable[[Receipt], dg.AssetCheckResult]
) -> dg.AssetCheckResult:
    """What `judge` makes of the stage's receipt; nothing is wrong with a stage that is switched off.

    Raises dg.Failure where the stage was never built.
    """
    if not STAGES[stage].enabled(recipe):
        return dg.AssetCheckResult(passed=True, description="switched off")
    receipt = current_receipt(store, recipe.name, stage)
    if receipt is None:
        raise dg.Failure(f"{recipe.name} has no {stage} checkpoint to check", allow_retries=False)
    return judge(receipt)


def accuracy_result(receipt: Receipt, name: str, least: float) -> dg.AssetCheckResult:
    """Pass or warn on an accuracy measured in the stage: `<name>_correct`, `_questions`, `_chance`."""
    metrics = receipt.metrics
    if not metrics.get(f"{name}_questions"):
        return dg.AssetCheckResult(
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"{name} was not measured in this run (receipt {receipt.digest()[:12]})",
        )
    correct, questions = int(metrics[f"{name}_correct"]), int(metrics[f"{name}_questions"])
    accuracy = correct / questions
    interval = wilson(correct, questions)
    return dg.AssetCheckResult(
        passed=accuracy >= least,
        severity=dg.AssetCheckSeverity.WARN,
        description=(
            f"{accuracy:.1%} of {questions} questions (95 % interval {interval.low:.1%}–{interval.high:.1%}, "
            f"chance {metrics[f'{name}_chance']:.1%}), at least {least:.0%} wanted"
        ),
        metadata={
            "accuracy": accuracy,
            "questions": questions,
            "chance": metrics[f"{name}_chance"],
            "interval_low": interval.low,
            "interval_high": interval.high,
            "wanted": least,
        },
    )


def bpb_result(receipt: Receipt, recipe: Recipe) -> dg.AssetCheckResult:
    """Pass or warn on the base model's bits per byte."""
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


def model_checks(store: ObjectStore, recipe: Recipe) -> dict[str, dg.AssetCheckResult]:
    """The checks of a model's checkpoints by their names, from its receipts as they are now. Raises
    dg.Failure where a stage was never built."""
    judged = recipe.evaluation
    checks: dict[str, tuple[str, Callable[[Receipt], dg.AssetCheckResult]]] = {
        "base_val_bpb": ("base", lambda receipt: bpb_result(receipt, recipe)),
        "sft_mmlu_accuracy": (
            "sft",
            lambda receipt: accuracy_result(receipt, "mmlu", judged.min_mmlu_accuracy),
        ),
        "sft_arc_easy_accuracy": (
            "sft",
            lambda receipt: accuracy_result(receipt, "arc_easy", judged.min_arc_easy_accuracy),
        ),
    }
    return {name: check_receipt(store, recipe, stage, judge) for name, (stage, judge) in checks.items()}
