"""A training stage's life, the same for every stage and every launcher.

skip if the receipt is good → check what it needs → guard → wait for this machine → look again → take
the lease (adopting a live attempt where there is one) → launch → watch: events become log lines and
observations → receipt → verify.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import dagster as dg

from dagster_nanochat.guards import MAX_HOURS_TAG, StageConfig, check_estimate, deadline_s
from dagster_nanochat.launch.base import Handle, Launcher, Offer, Request
from dagster_nanochat.metadata import live_metrics_key
from dagster_nanochat.pipes import EventStreamReader, LiveReport, NoContext
from nanochat.attempts import read_summary, summaries, write_summary
from nanochat.data.identity import conversation_files, shard_files
from nanochat.events import Cursor, Event, EventStream
from nanochat.export.markdown import table
from nanochat.failures import AttemptFailed, Failure
from nanochat.plan import plan_stage
from nanochat.recipes import Recipe
from nanochat.sources_digest import code_revision, sources_digest
from nanochat.stages import StageState, Status, resolve
from nanochat.store import ObjectStore, StoreError, project_root
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import (
    Lease,
    LeaseHeld,
    LeaseKeeper,
    LeaseLost,
    machine_name,
    new_token,
    read_lease,
)
from nanochat.store.receipts import InputRef, Receipt, missing_outputs, point, read_receipt
from nanochat.supervisor import LEASE_TTL_S
from nanochat.training.job import TrainingJob

HELD_TTL_S = 30.0
WATCH_GRACE_S = 120.0
_NEXT_STEPS = {
    Failure.DEADLINE: f". Raise the cap ({MAX_HOURS_TAG}, or max_hours) that the deadline is made of; the "
    "next run goes on from the last checkpoint"
}
_POLL_S = 0.5
_STATUS_EVERY_S = 2.0


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


class HeldLease:
    """A lease that was taken: renewed by a thread, whatever its holder waits for, and given back."""

    def __init__(self, keeper: LeaseKeeper) -> None:
        self._keeper = keeper
        self._end = threading.Event()
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._keeper.release()

    def check(self) -> None:
        """Raises LeaseLost where somebody else has it by now."""
        if self._lost:
            raise self._lost

    def _renew(self) -> None:
        while not self._end.wait(HELD_TTL_S / 4):
            try:
                self._keeper.renew()
            except LeaseLost as error:
                self._lost = error
                return
            except (StoreError, OSError, ValueError):
                continue  # there is time to try again before it expires


def wait_for_lease(
    context: dg.AssetExecutionContext, keeper: LeaseKeeper, waits: Callable[[Lease], str]
) -> HeldLease:
    """Take a lease as soon as it is free, saying meanwhile what `waits` makes of who has it.

    Raises DagsterExecutionInterruptedError when the run is terminated.
    """
    said: str | None = None
    while True:
        try:
            keeper.take()
            return HeldLease(keeper)
        except LeaseHeld as held:
            if said != held.lease.token:
                said = held.lease.token
                context.log.info(waits(held.lease))
            raise_if_cancelled(context)
            time.sleep(1.0)


class StillAlive(Exception):
    """The lease that was looked at has been renewed; `lease` says by whom."""

    def __init__(self, lease: Lease) -> None:
        super().__init__(lease.describe())
        self.lease = lease


def take_if_silent(
    context: dg.AssetExecutionContext,
    keeper: LeaseKeeper,
    what: str,
    find: Callable[[Lease], Handle | None] = lambda lease: None,
) -> Handle | None:
    """Take a lease whose holder does not renew it any more, which may need looking at for its time.

    Returns None with the lease, or what `find` finds of the machine of who holds it. Raises StillAlive
    where it is renewed meanwhile, DagsterExecutionInterruptedError when the run is terminated.
    """
    seen: Lease | None = None
    while True:
        try:
            keeper.take()
            return None
        except LeaseHeld as held:
            handle = find(held.lease)
            if handle is not None:
                return handle
            if seen is None:
                seen = held.lease
                context.log.info(
                    f"{what} waits: {seen.describe()} may be gone; unless it renews its lease, this run "
                    f"goes on in {seen.ttl_s:.0f} s at most"
                )
            elif held.lease != seen:
                raise StillAlive(held.lease) from None
            raise_if_cancelled(context)
            time.sleep(1.0)


def train_stage(
    context: dg.AssetExecutionContext,
    stage: str,
    recipe: Recipe,
    store: ObjectStore,
    launcher: Launcher,
    config: StageConfig,
) -> BuiltStage:
    """Bring a training stage of a model to a good receipt. Raises dg.Failure."""
    states = resolve(recipe, store)
    before = states[stage]
    forced = config.forced(context, stage)
    found = fresh_stage(context, recipe, store, before, forced=forced, seen=before.receipt)
    if found:
        return found
    offer = launcher.offers(Request.of(recipe.hardware))[0]
    plan = plan_stage(
        recipe, stage, states, store, flops_per_s=offer.flops_per_s, usd_per_h=offer.price_usd_per_h
    )
    check_estimate(context, config, recipe, plan, offer)
    require_upstream(before, states, recipe.name)
    try:
        with _slot(context, store, recipe, stage), _watching(context, store, recipe, before) as watch:
            # While this run waited, others may have built the stage, or something that it needs.
            states = resolve(recipe, store)
            state = states[stage]
            require_upstream(state, states, recipe.name)
            if state.fingerprint != before.fingerprint:
                raise dg.Failure(
                    f"what {stage} of {recipe.name} is made of has changed while it waited; run it again",
                    allow_retries=False,
                )
            found = fresh_stage(context, recipe, store, state, forced=forced, seen=before.receipt)
            if found:
                return found
            record_identity(store, state)
            store.put(f"{state.prefix}/plan.json", plan.to_bytes())
            attempt = _Attempt(context, store, launcher, recipe, states, stage, watch)
            receipt = attempt.complete(offer, deadline_s=deadline_s(context, config, offer))
            point(store, recipe.name, stage, receipt.fingerprint)
            return BuiltStage(stage=stage, fingerprint=receipt.fingerprint, receipt=receipt, built=True)
    except AttemptFailed as error:
        raise dg.Failure(f"{stage} of {recipe.name}: {error}", allow_retries=False) from error


def _slot(context: dg.AssetExecutionContext, store: ObjectStore, recipe: Recipe, stage: str) -> HeldLease:
    """One training stage at a time on this machine: wait, saying so, until the slot is free.

    A slot that is lost all the same (to somebody who found it expired, while this machine slept) is no
    reason to throw a training away.
    """
    keeper = LeaseKeeper(
        store,
        f"slots/{machine_name()}/0.json",
        token=f"{context.run.run_id}/{stage}",
        owner=f"{stage} of {recipe.name}",
        ttl_s=HELD_TTL_S,
    )
    return wait_for_lease(
        context,
        keeper,
        lambda lease: f"{stage} of {recipe.name} waits: {lease.describe()} uses this machine",
    )


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
        ttl_s=HELD_TTL_S,
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


def raise_if_cancelled(context: dg.AssetExecutionContext) -> None:
    """Dagster cannot interrupt a run that a foreground command executes, so its status is polled.

    What is raised then is what Dagster raises where it can: the run ends as cancelled, not as failed.
    """
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
        raise dg.DagsterExecutionInterruptedError("the run was terminated")


class _Attempt:
    """One attempt at one stage, watched to its end."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        store: ObjectStore,
        launcher: Launcher,
        recipe: Recipe,
        states: dict[str, StageState],
        stage: str,
        watch: HeldLease,
    ) -> None:
        self._context = context
        self._store = store
        self._launcher = launcher
        self._recipe = recipe
        self._states = states
        self._state = states[stage]
        self._watch_lease = watch

    def complete(self, offer: Offer, *, deadline_s: float) -> Receipt:
        """Launch or adopt, watch, verify. Raises dg.Failure with the failure's word and the story."""
        stage = self._state.spec.name
        handle, adopted = self._start(offer, deadline_s)
        self._context.log.info(
            f"{stage}: {'adopted the live' if adopted else 'launched'} attempt {handle.token} on {offer.name}"
        )
        try:
            ending = self._watch(handle)
        except LeaseLost as error:
            raise dg.Failure(
                f"another run watches {stage} of {self._recipe.name} now and has its machine: {error}",
                allow_retries=False,
            ) from error
        except BaseException:
            # Terminate, Ctrl-C and our own faults alike: no machine is left behind a dead step.
            self._launcher.terminate(handle)
            self._tell_story(handle)
            raise
        try:
            return self._verify(handle, ending)
        except dg.Failure:
            self._tell_story(handle)
            raise

    def _tell_story(self, handle: Handle) -> None:
        """On the stage's page: this attempt is over without a receipt, and what came before it.

        Where the store cannot be read the log says so: why the attempt ended is the more important news.
        """
        try:
            told = summaries(self._store, self._state.prefix)
        except (StoreError, ValueError, OSError) as error:
            self._context.log.warning(f"what the attempts have done cannot be read: {error}")
            return
        rows = [summary.row(token) for token, summary in told.items()]
        last = next(row for row in rows if row["attempt"] == handle.token)
        self._context.log_event(
            dg.AssetObservation(
                asset_key=self._context.asset_key,
                partition=self._recipe.name,
                description=f"attempt {len(rows)} ended: {last['ended']}. {last['why']}",
                metadata={
                    "from_step": last["from step"],
                    "to_step": last["to step"],
                    "checkpoint": last["checkpoint"],
                    "ended": last["ended"],
                    "attempts": dg.MetadataValue.md(table(rows)),
                },
            )
        )

    def _start(self, offer: Offer, deadline_s: float) -> tuple[Handle, bool]:
        """Launch an attempt, or adopt the one that lives."""
        prefix = self._state.prefix
        token = new_token()
        lease = LeaseKeeper(
            self._store, f"{prefix}/lease.json", token=token, owner="orchestrator", ttl_s=LEASE_TTL_S
        )
        what = f"{self._state.spec.name} of {self._recipe.name}"
        try:
            handle = take_if_silent(
                self._context, lease, what, lambda held: self._launcher.find(held.token, prefix)
            )
        except StillAlive as alive:
            raise dg.Failure(
                f"{what} is being built by {alive}, which this machine cannot reach; its lease ends at "
                f"{alive.lease.expires_at:%H:%M:%S} UTC unless it is renewed",
                allow_retries=False,
            ) from alive
        if handle is not None:
            return handle, True
        try:
            return self._launcher.launch(self._job(token, deadline_s), offer), False
        except BaseException:
            lease.release()
            raise

    def _job(self, token: str, deadline_s: float) -> TrainingJob:
        stage, recipe = self._state.spec.name, self._recipe
        receipts = {name: self._states[name].receipt for name in self._state.spec.upstream}
        inputs = tuple(
            InputRef(stage=name, fingerprint=receipt.fingerprint, receipt_sha256=receipt.digest())
            for name, receipt in receipts.items()
            if receipt is not None
        )
        tokenizer = receipts["tokenizer"]
        assert tokenizer is not None
        assert self._state.identity is not None
        train, validation = shard_files(self._store, recipe) if stage == "base" else ((), None)
        previous = receipts.get({"midtrain": "base", "sft": "midtrain"}.get(stage, ""))
        data = receipts.get({"midtrain": "midtrain_data", "sft": "sft_data"}.get(stage, ""))
        return TrainingJob(
            stage=stage,
            stage_version=self._state.spec.version,
            fingerprint=self._state.fingerprint or "",
            token=token,
            model=recipe.name,
            recipe=recipe,
            store_url=self._store.url,
            prefix=self._state.prefix,
            inputs=inputs,
            data=self._state.identity.data,
            shards=train,
            validation=validation,
            tokenizer=tokenizer.output("tokenizer.json"),
            init_checkpoint=previous.outputs if previous else (),
            conversations=conversation_files(data) if data else {},
            hardware=self._launcher.hardware(recipe.hardware),
            deadline_s=deadline_s,
            watch_grace_s=WATCH_GRACE_S,
            code_revision=code_revision(project_root()),
            sources_sha256=sources_digest(self._state.spec.sources),
        )

    def _watch(self, handle: Handle) -> Event | None:
        """Pump events until the attempt says how it ended, or its machine is gone."""
        attempt = attempt_prefix(self._state.prefix, handle.token)
        stage = self._state.spec.name
        summary = saved = read_summary(self._store, self._state.prefix, handle.token)
        stream = EventStream(self._store, f"{attempt}/events.jsonl")
        reader = EventStreamReader(stream, Cursor(offset=saved.offset))
        report = LiveReport(self._context, stage, live_metrics_key(self._recipe.name, stage))
        check_at = 0.0
        with dg.open_pipes_session(self._context, NoContext(), reader):
            while True:
                alive = self._launcher.alive(handle)
                events = reader.pump()
                summary = summary.after(events, reader.cursor)
                for event in events:
                    report.tell(event)
                    if event["type"] in ("finished", "failed"):
                        self._wait_until_gone(handle)
                        return event
                if not alive:
                    return None
                self._watch_lease.check()
                if time.monotonic() >= check_at:
                    check_at = time.monotonic() + _STATUS_EVERY_S
                    raise_if_cancelled(self._context)
                    if summary != saved:
                        saved = summary
                        write_summary(self._store, self._state.prefix, handle.token, saved)
                time.sleep(_POLL_S)

    def _wait_until_gone(self, handle: Handle) -> None:
        deadline = time.monotonic() + 15
        while self._launcher.alive(handle) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._launcher.terminate(handle)

    def _verify(self, handle: Handle, ending: Event | None) -> Receipt:
        spec, fingerprint = self._state.spec, self._state.fingerprint
        assert fingerprint is not None
        if ending is not None and ending["type"] == "failed":
            raise dg.Failure(
                f"{spec.name} of {self._recipe.name} ended with {ending['failure']}: {ending['message']}"
                + _NEXT_STEPS.get(ending["failure"], ""),
                metadata={"failure": ending["failure"], "attempt": handle.token},
                allow_retries=False,
            )
        receipt = read_receipt(self._store, spec.name, fingerprint)
        if receipt is None or receipt.token != handle.token:
            raise dg.Failure(
                f"{spec.name} of {self._recipe.name} ended with {Failure.LOST}: the supervisor of attempt "
                f"{handle.token} is gone and left no receipt. {self._launcher.last_words(handle)}".rstrip(),
                allow_retries=False,
            )
        problems = missing_outputs(self._store, receipt)
        if problems:
            raise dg.Failure(f"the receipt of {spec.name} does not hold: {'; '.join(problems)}")
        return receipt
