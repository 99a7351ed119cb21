"""A training stage's life, the same for every stage and every launcher.

skip if the receipt is good → check what it needs → guard → wait for this machine → look again → take
the lease (adopting a live attempt where there is one) → launch → watch: events become log lines and
observations → receipt → verify.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

import dagster as dg

from dagster_nanochat import holding
from dagster_nanochat.guards import Cap, StageConfig, cap_usd, check_estimate, terms
from dagster_nanochat.holding import HeldLease, StillAlive, take_if_silent, wait_for_lease
from dagster_nanochat.launch.base import Launcher, Offer, Request
from dagster_nanochat.stage_attempt import Attempts, stage_failure, with_capacity
from dagster_nanochat.webhook import told_at_the_end
from nanochat.failures import AttemptFailed, Failure
from nanochat.plan import plan_stage
from nanochat.recipes import Recipe
from nanochat.stages import StageState, Status, resolve
from nanochat.store import ObjectStore, S3Store, StoreError
from nanochat.store.leases import Lease, LeaseKeeper, read_lease
from nanochat.store.receipts import Receipt, point


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltStage:
    """What came of asking for a stage: its receipt, and whether it was built now or found."""

    stage: str
    fingerprint: str
    receipt: Receipt
    built: bool

    @property
    def summary(self) -> str:
        """The line that quickstart prints for the stage."""
        if self.built:
            return f"{self.stage}: built in {self.receipt.seconds:.0f} s"
        return f"{self.stage}: fresh (receipt {self.receipt.digest()[:6]}…)"


def require_upstream(state: StageState, states: dict[str, StageState], model: str) -> None:
    """Raise dg.Failure naming everything the stage lacks and the command that gets it."""
    lacking = list(state.needs)
    lacking += [
        f"{name} ({states[name].status}: {'; '.join(states[name].reasons) or 'never built'})"
        for name in state.spec.upstream
        if states[name].fingerprint and states[name].status is not Status.FRESH
    ]
    if lacking:
        raise dg.Failure(
            f"{state.spec.name} of {model} cannot start; it needs: {' | '.join(lacking)}. "
            f"Run `dg launch --job ingest_shards …` for shards, then "
            f"`dg launch --job model_training --partition {model}` for what lies upstream, "
            f"or see `nanochat plan --model {model}`.",
            allow_retries=False,
        )


def warn_of_store(context: dg.AssetExecutionContext, store: ObjectStore) -> None:
    """Try what leases need of the store, and say what it lacks. Raises StoreError."""
    caveat = store.caveat() if isinstance(store, S3Store) else None
    if caveat:
        context.log.warning(caveat)


def record_identity(store: ObjectStore, state: StageState) -> None:
    """Keep what the fingerprint was made of, once."""
    assert state.identity is not None
    if store.head(state.identity.key()) is None:
        store.put(state.identity.key(), state.identity.to_bytes())


def fresh_stage(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    store: ObjectStore,
    state: StageState,
    *,
    forced: bool,
    seen: Receipt | None,
) -> BuiltStage | None:
    """The stage as it is where nothing is to be done: it is fresh, and not forced unless somebody has
    built it since `seen` was its receipt."""
    if state.status is not Status.FRESH or (forced and state.receipt == seen):
        return None
    assert state.receipt is not None
    assert state.fingerprint is not None
    point(store, recipe.name, state.spec.name, state.fingerprint)
    context.log.info(f"{state.spec.name}: fresh, nothing to do (receipt {state.receipt.digest()[:6]}…)")
    return BuiltStage(
        stage=state.spec.name, fingerprint=state.fingerprint, receipt=state.receipt, built=False
    )


def train_stage(
    context: dg.AssetExecutionContext,
    stage: str,
    recipe: Recipe,
    store: ObjectStore,
    launcher: Launcher,
    config: StageConfig,
) -> BuiltStage:
    """Bring a training stage of a model to a good receipt. Raises dg.Failure."""
    try:
        return _train_stage(context, stage, recipe, store, launcher, config)
    except AttemptFailed as error:
        raise stage_failure(f"{stage} of {recipe.name}", error) from error
    except StoreError as error:
        raise dg.Failure(f"{stage} of {recipe.name}: {error}", allow_retries=False) from error


def _train_stage(
    context: dg.AssetExecutionContext,
    stage: str,
    recipe: Recipe,
    store: ObjectStore,
    launcher: Launcher,
    config: StageConfig,
) -> BuiltStage:
    states = resolve(recipe, store)
    before = states[stage]
    what = f"{stage} of {recipe.name}"
    forced = config.forced(context, stage)
    found = fresh_stage(context, recipe, store, before, forced=forced, seen=before.receipt)
    if found:
        return found
    request = Request.of(recipe.hardware)
    work = plan_stage(recipe, stage, states, store)
    offers = with_capacity(context, launcher, what, lambda: launcher.offers(request, work.flops))
    best = offers[0]
    plan = best.priced(work)
    check_estimate(context, config, recipe, plan, best, cap_usd(context, config, store, recipe))
    require_upstream(before, states, recipe.name)
    warn_of_store(context, store)
    with _slot(context, store, launcher, what), _watching(context, store, recipe, before) as watch:
        # While this run waited, others may have built the stage, or something that it needs.
        states = resolve(recipe, store)
        state = states[stage]
        require_upstream(state, states, recipe.name)
        if state.fingerprint != before.fingerprint:
            raise dg.Failure(
                f"what {what} is made of has changed while it waited; run it again", allow_retries=False
            )
        found = fresh_stage(context, recipe, store, state, forced=forced, seen=before.receipt)
        if found:
            return found
        record_identity(store, state)
        store.put(f"{state.prefix}/plan.json", plan.to_bytes())
        # By now money may have been spent.
        cap = cap_usd(context, config, store, recipe)
        check_estimate(context, config, recipe, plan, best, cap)
        attempts = Attempts(context, store, launcher, recipe, states, stage, watch)
        with told_at_the_end(context, store, recipe.name, stage, attempts.machines):
            receipt = attempts.complete(
                lambda: _affordable(launcher.offers(request, work.flops), work.flops, cap),
                lambda offer: terms(context, config, offer, cap),
            )
        point(store, recipe.name, stage, receipt.fingerprint)
        return BuiltStage(stage=stage, fingerprint=receipt.fingerprint, receipt=receipt, built=True)


def _affordable(offers: Sequence[Offer], flops: float | None, cap: Cap) -> list[Offer]:
    """Those on which the work is estimated at no more than the cap. Raises AttemptFailed."""
    found = [offer for offer in offers if offer.dollars(flops or 0.0) <= cap.usd]
    if not found:
        raise AttemptFailed(Failure.NO_CAPACITY, f"every offer that is left would cost more than {cap.name}")
    return found


def _slot(context: dg.AssetExecutionContext, store: ObjectStore, launcher: Launcher, what: str) -> HeldLease:
    """As many training stages at once as the launcher has slots: wait, saying so, until one is free.

    A slot that is lost all the same (to somebody who found it expired, while this machine slept) is no
    reason to throw a training away.
    """
    keepers = [
        LeaseKeeper(store, key, token=f"{context.run.run_id}/{what}", owner=what, ttl_s=holding.HELD_TTL_S)
        for key in launcher.slots()
    ]
    place = "this machine" if launcher.patience is None else f"{launcher.name}'s last free slot"
    return wait_for_lease(context, keepers, lambda lease: f"{what} waits: {lease.describe()} uses {place}")


@contextlib.contextmanager
def _watching(
    context: dg.AssetExecutionContext, store: ObjectStore, recipe: Recipe, state: StageState
) -> Iterator[HeldLease]:
    """Be the one run that watches the stage. A dead run that watched it before is closed in Dagster."""
    key = f"{state.prefix}/watch.json"
    before = read_lease(store, key)
    keeper = LeaseKeeper(
        store,
        key,
        token=context.run.run_id,
        owner=f"run {context.run.run_id[:8]} of {os.environ.get('USER', 'user')}",
        ttl_s=holding.HELD_TTL_S,
    )
    what = f"{state.spec.name} of {recipe.name}"
    try:
        take_if_silent(context, keeper, what)
    except StillAlive as alive:
        raise dg.Failure(
            f"{what} is being watched by {alive}; wait for that run or terminate it", allow_retries=False
        ) from alive
    with HeldLease(keeper) as watch:
        if before and not before.released and before.token != context.run.run_id:
            _close_dead_run(context, before, what)
        yield watch


def _close_dead_run(context: dg.AssetExecutionContext, watch: Lease, what: str) -> None:
    """Its process cannot say any more that it has ended, so it would stay STARTED for ever."""
    run = context.instance.get_run_by_id(watch.token)
    if run is not None and not run.is_finished:
        context.instance.report_run_failed(
            run,
            f"run {context.run.run_id} has taken over {what}: {watch.describe()} has not been heard of since "
            f"{watch.expires_at:%Y-%m-%d %H:%M:%S} UTC",
        )
        context.log.info(f"run {watch.token[:8]}, which watched {what} before, is dead: closed")
