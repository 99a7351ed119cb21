"""Guards: a stage whose estimate is above the cap does not start until somebody raises the cap."""

from __future__ import annotations

import math

import dagster as dg
from pydantic import Field

from dagster_nanochat.launch.base import Offer
from nanochat.plan import StagePlan
from nanochat.recipes import Recipe

FORCE_TAG = "nanochat/force"
MAX_HOURS_TAG = "nanochat/max_hours"
MAX_USD_TAG = "nanochat/max_usd"
# Enough for the quick model on a slow laptop, and for nothing larger.
DEFAULT_MAX_HOURS = 1.0
DEFAULT_MAX_USD = 1.0


class StageConfig(dg.Config):
    """What a person may say about one run of a stage. Tags of the same meaning reach every stage of a run."""

    max_hours: float | None = Field(
        default=None,
        gt=0,
        description=f"Refuse to start above so many hours on this machine ({MAX_HOURS_TAG})",
    )
    max_usd: float | None = Field(
        default=None, gt=0, description=f"Refuse to start above so many dollars ({MAX_USD_TAG})"
    )
    force: bool = Field(default=False, description=f"Rebuild the stage though it is fresh ({FORCE_TAG})")

    def forced(self, context: dg.AssetExecutionContext, stage: str) -> bool:
        """Whether this config or the run's tag names the stage (or ``all``)."""
        asked = context.run.tags.get(FORCE_TAG, "").split(",")
        return self.force or "all" in asked or stage in asked


def _cap(context: dg.AssetExecutionContext, configured: float | None, tag: str, default: float) -> float:
    if configured is not None:
        return configured
    text = context.run.tags.get(tag)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError as error:
        raise dg.Failure(f"run tag {tag}={text!r} is not a number", allow_retries=False) from error


def check_estimate(
    context: dg.AssetExecutionContext, config: StageConfig, recipe: Recipe, plan: StagePlan, offer: Offer
) -> None:
    """Raise dg.Failure where the plan's hours (on one's own machine) or dollars exceed the cap."""
    if plan.hours is None:
        return
    if offer.price_usd_per_h:
        dollars = plan.hours * offer.price_usd_per_h
        cap = _cap(context, config.max_usd, MAX_USD_TAG, DEFAULT_MAX_USD)
        if dollars > cap:
            raise dg.Failure(
                f"{plan.stage} of {recipe.name} is estimated at ${dollars:.2f} on {offer.name}, above the "
                f"cap of ${cap:.2f}. Raise it with the run tag {MAX_USD_TAG} (see `nanochat plan --model "
                f"{recipe.name}`).",
                allow_retries=False,
            )
        return
    cap = _cap(context, config.max_hours, MAX_HOURS_TAG, DEFAULT_MAX_HOURS)
    if plan.hours > cap:
        raise dg.Failure(
            f"{plan.stage} of {recipe.name} is estimated at {plan.hours:,.1f} hours on this machine "
            f"({offer.name}), above the cap of {cap:g} h. Raise it with the run tag {MAX_HOURS_TAG} or the "
            f"asset's config max_hours (here: {math.ceil(plan.hours * 1.5)}), or choose a smaller model; "
            f"`nanochat plan --model {recipe.name}` shows every stage.",
            allow_retries=False,
        )
