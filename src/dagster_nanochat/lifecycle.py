"""A training stage's life, the same for every stage and every launcher.

skip if the receipt is good → check what it needs → guard → take the lease (adopting a live attempt
where there is one) → launch → watch: events become log lines and observations → receipt → verify.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator

import dagster as dg

from dagster_nanochat.guards import StageConfig, check_estimate
from dagster_nanochat.launch.base import Handle, Launcher, Offer, Request
from dagster_nanochat.metadata import live_metrics_key
from dagster_nanochat.pipes import EventStreamReader, NoContext
from nanochat.data.identity import conversation_files, shard_files
from nanochat.events import Cursor, Event, EventStream
from nanochat.failures import AttemptFailed, Failure
from nanochat.plan import plan_stage
from nanochat.recipes import Recipe
from nanochat.sources_digest import code_revision, sources_digest
from nanochat.stages import StageState, Status, resolve
from nanochat.store import ObjectStore, project_root
from nanochat.store.leases import LeaseHeld, LeaseKeeper, machine_name, new_token
from nanochat.store.receipts import InputRef, Receipt, missing_outputs, point, read_receipt
from nanochat.supervisor import LEASE_TTL_S
from nanochat.training.job import TrainingJob

MAX_OBSERVATIONS = 100
_POLL_S = 0.5
_WATCH_TTL_S = 30.0
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
    state = states[stage]
    if state.status is Status.FRESH and not config.forced(context, stage):
        assert state.receipt is not None
        assert state.fingerprint is not None
        point(store, recipe.name, stage, state.fingerprint)
        context.log.info(f"{stage}: fresh, nothing to do (receipt {state.receipt.digest()[:6]}…)")
        return BuiltStage(stage=stage, fingerprint=state.fingerprint, receipt=state.receipt, built=False)
    offer = launcher.offers(Request.of(recipe.hardware))[0]
    plan = plan_stage(recipe, stage, states, store, flops_per_s=offer.flops_per_s)
    check_estimate(context, config, recipe, plan, offer)
    require_upstream(state, states, recipe.name)
    assert state.fingerprint is not None
    record_identity(store, state)
    store.put(f"{state.prefix}/plan.json", plan.to_bytes())
    try:
        with _slot(context, store, recipe, stage) as slot:
            receipt = _Attempt(context, store, launcher, recipe, state, states, slot).complete(offer)
    except AttemptFailed as error:
        raise dg.Failure(f"{stage} of {recipe.name}: {error}", allow_retries=False) from error
    point(store, recipe.name, stage, state.fingerprint)
    return BuiltStage(stage=stage, fingerprint=state.fingerprint, receipt=receipt, built=True)


@contextlib.contextmanager
def _slot(
    context: dg.AssetExecutionContext, store: ObjectStore, recipe: Recipe, stage: str
) -> Iterator[LeaseKeeper]:
    """One training stage at a time on this machine: wait, saying so, until the slot is free."""
    keeper = LeaseKeeper(
        store,
        f"slots/{machine_name()}/0.json",
        token=f"{context.run.run_id}/{stage}",
        owner=f"{stage} of {recipe.name}",
        ttl_s=_WATCH_TTL_S,
    )
    said: str | None = None
    while True:
        try:
            keeper.take()
            break
        except LeaseHeld as held:
            if said != held.lease.token:
                said = held.lease.token
                context.log.info(f"{stage} of {recipe.name} waits: {held.lease.describe()} uses this machine")
            _raise_if_cancelled(context)
            time.sleep(1.0)
    try:
        yield keeper
    finally:
        keeper.release()


def _raise_if_cancelled(context: dg.AssetExecutionContext) -> None:
    """Dagster cannot interrupt a run that a foreground command executes, so its status is polled."""
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
        raise AttemptFailed(Failure.CANCELLED, "the run was terminated")


class _Attempt:
    """One attempt at one stage, watched to its end."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        store: ObjectStore,
        launcher: Launcher,
        recipe: Recipe,
        state: StageState,
        states: dict[str, StageState],
        slot: LeaseKeeper,
    ) -> None:
        self._context = context
        self._store = store
        self._launcher = launcher
        self._recipe = recipe
        self._state = state
        self._states = states
        self._slot = slot
        self._observed = 0
        self._gpu: dict[str, float] = {}

    def complete(self, offer: Offer) -> Receipt:
        """Launch or adopt, watch, verify. Raises dg.Failure with the failure's word and the story."""
        spec, model = self._state.spec, self._recipe.name
        watch = LeaseKeeper(
            self._store,
            f"{self._state.prefix}/watch.json",
            token=self._context.run.run_id,
            owner=f"run {self._context.run.run_id[:8]} of {os.environ.get('USER', 'user')}",
            ttl_s=_WATCH_TTL_S,
        )
        try:
            watch.take()
        except LeaseHeld as held:
            raise dg.Failure(
                f"{spec.name} of {model} is being watched by {held.lease.describe()}; wait for that run or "
                "terminate it",
                allow_retries=False,
            ) from held
        try:
            handle, adopted = self._start(offer)
            self._context.log.info(
                f"{spec.name}: {'adopted the live' if adopted else 'launched'} attempt {handle.token} on "
                f"{offer.name}"
            )
            try:
                ending = self._watch(handle, watch)
            except BaseException:
                # Terminate, Ctrl-C and our own faults alike: no machine is left behind a dead step.
                self._launcher.terminate(handle)
                raise
            return self._verify(handle, ending)
        finally:
            watch.release()

    def _start(self, offer: Offer) -> tuple[Handle, bool]:
        prefix, spec = self._state.prefix, self._state.spec
        token = new_token()
        lease = LeaseKeeper(
            self._store, f"{prefix}/lease.json", token=token, owner="orchestrator", ttl_s=LEASE_TTL_S
        )
        try:
            lease.take()
        except LeaseHeld as held:
            handle = self._launcher.find(held.lease.token, prefix)
            if handle is None:
                raise dg.Failure(
                    f"{spec.name} of {self._recipe.name} is being built by {held.lease.describe()}, which "
                    f"this machine cannot reach; its lease ends at {held.lease.expires_at:%H:%M:%S} UTC "
                    "unless it is renewed",
                    allow_retries=False,
                ) from held
            return handle, True
        try:
            return self._launcher.launch(self._job(token), offer), False
        except BaseException:
            lease.release()
            raise

    def _job(self, token: str) -> TrainingJob:
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
            code_revision=code_revision(project_root()),
            sources_sha256=sources_digest(self._state.spec.sources),
        )

    def _watch(self, handle: Handle, watch: LeaseKeeper) -> Event | None:
        """Pump events until the attempt says how it ended, or its machine is gone."""
        events_key = f"{self._state.prefix}/attempts/{handle.token}/events.jsonl"
        reader = EventStreamReader(EventStream(self._store, events_key), Cursor())
        check_at = 0.0
        renew_at = time.monotonic() + _WATCH_TTL_S / 4
        with dg.open_pipes_session(self._context, NoContext(), reader):
            while True:
                alive = self._launcher.alive(handle)
                for event in reader.pump():
                    self._report(event)
                    if event["type"] in ("finished", "failed"):
                        self._wait_until_gone(handle)
                        return event
                if not alive:
                    return None
                now = time.monotonic()
                if now >= check_at:
                    check_at = now + _STATUS_EVERY_S
                    _raise_if_cancelled(self._context)
                if now >= renew_at:
                    renew_at = now + _WATCH_TTL_S / 4
                    watch.renew()
                    self._slot.renew()
                time.sleep(_POLL_S)

    def _wait_until_gone(self, handle: Handle) -> None:
        deadline = time.monotonic() + 15
        while self._launcher.alive(handle) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._launcher.terminate(handle)

    def _report(self, event: Event) -> None:
        """Progress as log lines, metrics as observations: at most `MAX_OBSERVATIONS` a run."""
        if event["type"] == "step" and self._due(int(event["step"]), int(event["steps"])):
            self._context.log.info(progress_line(self._state.spec.name, event))
            self._observe({**_numbers(event), **self._gpu})
        elif event["type"] == "gpu":
            self._gpu = _numbers(event)
        elif event["type"] == "eval":
            metrics = {name: float(value) for name, value in event["metrics"].items() if value is not None}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self._context.log.info(f"{self._state.spec.name} step {event['step']}: {shown}")
            self._observe({"step": float(event["step"]), **metrics})
        elif event["type"] == "checkpoint":
            self._context.log.info(f"{self._state.spec.name} step {event['step']}: checkpoint committed")
        elif event["type"] == "phase":
            self._context.log.info(f"{self._state.spec.name}: {event['name']}")

    def _due(self, step: int, steps: int) -> bool:
        # Evaluations share the budget of points; some thirty step points leave them room.
        every = max(1, steps // 30)
        return step == 1 or step == steps or step % every == 0

    def _observe(self, metrics: dict[str, float]) -> None:
        if self._observed >= MAX_OBSERVATIONS:
            return
        self._observed += 1
        self._context.log_event(
            dg.AssetObservation(
                asset_key=live_metrics_key(self._recipe.name, self._state.spec.name), metadata=metrics
            )
        )

    def _verify(self, handle: Handle, ending: Event | None) -> Receipt:
        spec, fingerprint = self._state.spec, self._state.fingerprint
        assert fingerprint is not None
        if ending is not None and ending["type"] == "failed":
            raise dg.Failure(
                f"{spec.name} of {self._recipe.name} ended with {ending['failure']}: {ending['message']}",
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


def progress_line(stage: str, event: Event) -> str:
    """``base  400/1600  loss 2.31  41.2k tok/s  ETA 1:58``."""
    eta = int(event.get("eta_s") or 0)
    rate = float(event.get("tokens_per_s") or 0)
    loss = event.get("loss")
    return (
        f"{stage} step {event['step']}/{event['steps']}  "
        f"loss {'nan' if loss is None else f'{loss:.3f}'}  "
        f"{rate / 1000:.1f}k tok/s  ETA {eta // 60}:{eta % 60:02d}"
    )


def _numbers(event: Event) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in event.items()
        if name not in ("type", "time", "steps") and isinstance(value, int | float)
    }
