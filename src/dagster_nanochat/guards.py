"""Guards: a stage whose estimate is above the cap does not start until somebody raises the cap."""

from __future__ import annotations

import math

import dagster as dg
from pydantic import Field

from dagster_nanochat.launch.base import Offer
from nanochat.plan import StagePlan
from nanochat.recipes import Recipe
from nanochat.stages import STAGES

FORCE_TAG = "nanochat/force"
MAX_HOURS_TAG = "nanochat/max_hours"
MAX_USD_TAG = "nanochat/max_usd"
# Enough for the quick model on a slow laptop, and for nothing larger.
DEFAULT_MAX_HOURS = 1.0
DEFAULT_MAX_USD = 1.0
# An estimate within the cap may be wrong, and a busy machine is slow: a stage on one's own machine is
# ended (with a checkpoint) only when it has run this many times the cap.
DEADLINE_FACTOR = 4.0


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
        try:
            asked = stages_named(context.run.tags.get(FORCE_TAG, ""))
        except ValueError as error:
            raise dg.Failure(f"run tag {FORCE_TAG}: {error}", allow_retries=False) from error
        return self.force or stage in asked


def stages_named(text: str) -> frozenset[str]:
    """The stages that ``base, sft`` or ``all`` names. Raises ValueError for a name that is none."""
    names = {name.strip() for name in text.split(",")} - {""}
    unknown = sorted(names - STAGES.keys() - {"all"})
    if unknown:
        raise ValueError(
            f"no stage is called {', '.join(map(repr, unknown))}; there are {', '.join(STAGES)}, and 'all'"
        )
    return frozenset(STAGES) if "all" in names else frozenset(names)


def _cap(context: dg.AssetExecutionContext, configured: float | None, tag: str, default: float) -> float:
    if configured is not None:
        return configured
    text = context.run.tags.get(tag)
    if text is None:
        return default
    try:
        cap = float(text)
    except ValueError:
        cap = math.nan
    if not 0 < cap < math.inf:
        raise dg.Failure(f"run tag {tag}={text!r} is not a number above 0", allow_retries=False)
    return cap


def _max_hours(context: dg.AssetExecutionContext, config: StageConfig) -> float:
    return _cap(context, config.max_hours, MAX_HOURS_TAG, DEFAULT_MAX_HOURS)


def _max_usd(context: dg.AssetExecutionContext, config: StageConfig) -> float:
    return _cap(context, config.max_usd, MAX_USD_TAG, DEFAULT_MAX_USD)


def deadline_s(context: dg.AssetExecutionContext, config: StageConfig, offer: Offer) -> float:
    """How long an attempt may run: what the cap in dollars buys on a rented machine, `DEADLINE_FACTOR`
    times the cap in hours on one's own."""
    if offer.price_usd_per_h:
        return 3600 * _max_usd(context, config) / offer.price_usd_per_h
    return 3600 * _max_hours(context, config) * DEADLINE_FACTOR


def check_estimate(
    context: dg.AssetExecutionContext, config: StageConfig, recipe: Recipe, plan: StagePlan, offer: Offer
) -> None:
    """Raise dg.Failure where the plan's hours (on one's own machine) or dollars exceed the cap."""
    if plan.dollars:
        usd = _max_usd(context, config)
        if plan.dollars > usd:
            raise dg.Failure(
                f"{plan.stage} of {recipe.name} is estimated at ${plan.dollars:.2f} on {offer.name}, above "
                f"the cap of ${usd:.2f}. Raise it with the run tag {MAX_USD_TAG} (see `nanochat plan --model "
                f"{recipe.name}`).",
                allow_retries=False,
            )
        return
    hours = _max_hours(context, config)
    if plan.hours is not None and plan.hours > hours:
        raise dg.Failure(
            f"{plan.stage} of {recipe.name} is estimated at {plan.hours:,.1f} hours on this machine "
            f"({offer.name}), above the cap of {hours:g} h. Raise it with the run tag {MAX_HOURS_TAG} or the "
            f"asset's config max_hours (here: {math.ceil(plan.hours * 1.5)}), or choose a smaller model; "
            f"`nanochat plan --model {recipe.name}` shows every stage.",
            allow_retries=False,
        )
