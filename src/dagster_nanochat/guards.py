"""Guards: a stage whose estimate is above the cap does not start until somebody raises the cap."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_nanochat.launch.base import Offer
from nanochat.plan import StagePlan
from nanochat.recipes import Recipe
from nanochat.stages import STAGES
from nanochat.store import ObjectStore
from nanochat.store.leases import utc_now
from nanochat.store.ledger import entries, user_name

FORCE_TAG = "nanochat/force"
MAX_HOURS_TAG = "nanochat/max_hours"
MAX_USD_TAG = "nanochat/max_usd"
# Enough for the quick model on a slow laptop, and for nothing larger.
DEFAULT_MAX_HOURS = 1.0
DEFAULT_MAX_USD = 1.0
# An estimate within the cap may be wrong, and a busy machine is slow: a stage on one's own machine is
# ended (with a checkpoint) only when it has run this many times the cap.
DEADLINE_FACTOR = 4.0
MAX_USD_PER_MODEL_ENV = "NANOCHAT_MAX_USD_PER_MODEL"
MAX_USD_PER_MONTH_ENV = "NANOCHAT_MAX_USD_PER_MONTH"
# Between the end that the budget brings, with a checkpoint, and that of the deadline behind it.
BUDGET_GRACE_S = 600.0


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
    runpod: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the runpod launcher for this run: gpu_type_id, gpu_count, cloud_type, …",
    )

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
    return default if text is None else _number(text, f"run tag {tag}")


def _number(text: str, name: str) -> float:
    """A number above 0. Raises dg.Failure that says whose it is not."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise dg.Failure(f"{name}={text!r} is not a number above 0", allow_retries=False)
    return number


def _max_hours(context: dg.AssetExecutionContext, config: StageConfig) -> float:
    return _cap(context, config.max_hours, MAX_HOURS_TAG, DEFAULT_MAX_HOURS)


def _max_usd(context: dg.AssetExecutionContext, config: StageConfig) -> float:
    return _cap(context, config.max_usd, MAX_USD_TAG, DEFAULT_MAX_USD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What an attempt may take. max_usd: of money, where it runs on a rented machine."""

    deadline_s: float
    max_usd: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap:
    """Dollars that may still be spent, and what says so."""

    usd: float
    name: str


def cap_usd(
    context: dg.AssetExecutionContext, config: StageConfig, store: ObjectStore, recipe: Recipe
) -> Cap:
    """The tightest of the caps: of the stage, of the model (what was ever spent on it counts), of the
    user in this month."""
    usd = _max_usd(context, config)
    caps = [Cap(usd=usd, name=f"the cap of ${usd:.2f} for a stage. Raise it with the run tag {MAX_USD_TAG}")]
    month = f"{utc_now():%Y-%m}"
    for variable, whose, spent in (
        (
            MAX_USD_PER_MODEL_ENV,
            f"for {recipe.name}",
            lambda: sum(entry.dollars() for entry in entries(store) if entry.model == recipe.name),
        ),
        (
            MAX_USD_PER_MONTH_ENV,
            f"of {user_name()} in {month}",
            lambda: sum(entry.dollars() for entry in entries(store, month) if entry.user == user_name()),
        ),
    ):
        text = os.environ.get(variable)
        if not text:
            continue
        limit = _number(text, variable)
        left = limit - spent()
        caps.append(
            Cap(
                usd=left,
                name=f"the ${max(left, 0):.2f} that are left of the cap of ${limit:.2f} {whose} ({variable})",
            )
        )
    return min(caps, key=lambda cap: cap.usd)


def terms(context: dg.AssetExecutionContext, config: StageConfig, offer: Offer, cap: Cap) -> Terms:
    """What an attempt on the offer may take: on a rented machine what the cap in dollars buys and a
    little more (the machine's own count of its dollars ends it with a checkpoint before that), on one's
    own `DEADLINE_FACTOR` times the cap in hours."""
    if offer.price_usd_per_h:
        deadline_s = 3600 * cap.usd / offer.price_usd_per_h + BUDGET_GRACE_S
    else:
        deadline_s = 3600 * _max_hours(context, config) * DEADLINE_FACTOR
    return Terms(deadline_s=deadline_s, max_usd=cap.usd)


def check_estimate(
    context: dg.AssetExecutionContext,
    config: StageConfig,
    recipe: Recipe,
    plan: StagePlan,
    offer: Offer,
    cap: Cap,
) -> None:
    """Raise dg.Failure where the plan's hours (on one's own machine) or dollars exceed the cap."""
    if offer.price_usd_per_h:
        if cap.usd <= 0 or (plan.dollars or 0.0) > cap.usd:
            raise dg.Failure(
                f"{plan.stage} of {recipe.name} is estimated at ${plan.dollars or 0:.2f} on {offer.name}, "
                f"above {cap.name} (see `nanochat plan --model {recipe.name}`).",
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
