"""One attempt at a training stage: launched or adopted, watched to its end, its receipt verified."""

from __future__ import annotations

import time

import dagster as dg

from dagster_nanochat.guards import MAX_HOURS_TAG
from dagster_nanochat.holding import HeldLease, StillAlive, raise_if_cancelled, take_if_silent
from dagster_nanochat.launch.base import Handle, Launcher, Offer
from dagster_nanochat.metadata import live_metrics_key
from dagster_nanochat.pipes import EventStreamReader, LiveReport, NoContext
from nanochat.attempts import read_summary, summaries, write_summary
from nanochat.data.identity import conversation_files, shard_files
from nanochat.events import Cursor, Event, EventStream
from nanochat.export.markdown import table
from nanochat.failures import Failure
from nanochat.recipes import Recipe
from nanochat.sources_digest import code_revision, sources_digest
from nanochat.stages import StageState
from nanochat.store import ObjectStore, StoreError, project_root
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import LeaseKeeper, LeaseLost, new_token
from nanochat.store.receipts import InputRef, Receipt, missing_outputs, read_receipt
from nanochat.supervisor import LEASE_TTL_S
from nanochat.training.job import TrainingJob

WATCH_GRACE_S = 120.0
_NEXT_STEPS = {
    Failure.DEADLINE: f". Raise the cap ({MAX_HOURS_TAG}, or max_hours) that the deadline is made of; the "
    "next run goes on from the last checkpoint"
}
_POLL_S = 0.5
_STATUS_EVERY_S = 2.0


class Attempt:
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
