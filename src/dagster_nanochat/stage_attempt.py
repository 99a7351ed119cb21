"""One training stage on machines: launched or adopted, watched to its end, its receipt verified; where a
machine cannot be had, does not come up or is lost, the next one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import dagster as dg

from dagster_nanochat.guards import MAX_HOURS_TAG, MAX_USD_TAG, Terms
from dagster_nanochat.holding import HeldLease, StillAlive, raise_if_cancelled, take_if_silent
from dagster_nanochat.launch.base import Handle, Launcher, Offer, Patience
from dagster_nanochat.metadata import live_metrics_key
from dagster_nanochat.pipes import EventStreamReader, LiveReport, NoContext
from nanochat.attempts import attempts, read_summary, summaries, write_summary
from nanochat.data.identity import conversation_files, shard_files
from nanochat.events import ENDINGS, Cursor, Event, EventStream
from nanochat.export.markdown import table
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import Recipe
from nanochat.sources_digest import code_revision, sources_digest
from nanochat.stages import StageState
from nanochat.store import ObjectStore, StoreError, project_root
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import LeaseKeeper, LeaseLost, new_token, read_lease
from nanochat.store.ledger import read_entry, stage_dollars
from nanochat.store.receipts import InputRef, Receipt, missing_outputs, read_receipt
from nanochat.supervisor import LEASE_TTL_S
from nanochat.training.job import TrainingJob

WATCH_GRACE_S = 120.0
# What another machine may do better.
_RETRIED = (Failure.NO_CAPACITY, Failure.NOT_READY, Failure.LOST)
# What to do about an attempt that ended so.
_NEXT_STEPS = {
    Failure.DEADLINE: f". Raise the cap ({MAX_HOURS_TAG}, or max_hours) that the deadline is made of; the "
    "next run goes on from the last checkpoint",
    Failure.BUDGET: f". Raise the cap ({MAX_USD_TAG}, or max_usd); the next run goes on from the last "
    "checkpoint",
}
_RUN_AGAIN = ". Run it again: it goes on from the last checkpoint"
_POLL_S = 0.5
_STATUS_EVERY_S = 2.0
_TROUBLE_EVERY_S = 10.0
# The first pause before asking again where there was no capacity, and the longest.
_CAPACITY_PAUSES_S = (5.0, 120.0)


_Had = TypeVar("_Had")


def with_capacity(
    context: dg.AssetExecutionContext, launcher: Launcher, what: str, ask: Callable[[], _Had]
) -> _Had:
    """What `ask` gets, asked again where there is no capacity, for as long as the launcher is patient."""
    patience = launcher.patience
    deadline = time.monotonic() + (patience.capacity_s if patience else 0.0)
    pause_s = _CAPACITY_PAUSES_S[0]
    while True:
        try:
            return ask()
        except AttemptFailed as error:
            if error.failure is not Failure.NO_CAPACITY or time.monotonic() + pause_s > deadline:
                raise
            context.log.info(f"{what} waits: {error.message}. Asking again in {pause_s:.0f} s")
        again_at = time.monotonic() + pause_s
        while time.monotonic() < again_at:
            raise_if_cancelled(context)
            time.sleep(_POLL_S)
        pause_s = min(2 * pause_s, _CAPACITY_PAUSES_S[1])


def stage_failure(what: str, error: AttemptFailed) -> dg.Failure:
    """The stage's own failure, with the failure's word and what to do about it."""
    message = error.message
    if error.failure in (*_RETRIED, Failure.CANCELLED):
        message = message.rstrip(".") + _RUN_AGAIN
    return dg.Failure(
        f"{what} ended with {error.failure}: {message}",
        metadata={"failure": error.failure.value},
        allow_retries=False,
    )


class Attempts:
    """The attempts that one run makes at one stage."""

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
        self._what = f"{stage} of {recipe.name}"
        self._watch_lease = watch
        # Tokens of the attempts that this run has asked machines for, or has adopted.
        self.machines: list[str] = []

    def complete(self, offers: Callable[[], Sequence[Offer]], terms: Callable[[Offer], Terms]) -> Receipt:
        """Bring the stage to a good receipt.

        offers: asked for anew before every machine. terms: what an attempt on the offer may take.
        Raises dg.Failure with the failure's word and the story.
        """
        tried = 0
        while True:
            tried += 1
            try:
                return self._attempt(offers, terms)
            except AttemptFailed as error:
                if error.failure not in _RETRIED or tried >= self._launcher.max_machines:
                    raise stage_failure(self._what, error) from error
                self._context.log.warning(
                    f"{self._what}: {error.failure}: {error.message}. Trying another machine "
                    f"({tried} of {self._launcher.max_machines} tried)"
                )

    def _attempt(self, offers: Callable[[], Sequence[Offer]], terms: Callable[[Offer], Terms]) -> Receipt:
        """One machine: launched or adopted, watched, verified. Raises AttemptFailed and dg.Failure."""
        with contextlib.ExitStack() as lease:
            handle = self._adopt()
            if handle is None:
                handle = self._launch(offers, terms, lease)
            return self._see_through(handle, lease)

    def _see_through(self, handle: Handle, lease: contextlib.ExitStack) -> Receipt:
        self.machines.append(handle.token)
        try:
            receipt = self._verify(handle, self._watch(handle, lease))
        except LeaseLost as error:
            raise dg.Failure(
                f"another run watches {self._what} now and has its machine: {error}", allow_retries=False
            ) from error
        except AttemptFailed as error:
            stays = self._end(handle, error.failure)
            self._tell_story(handle)
            if stays:
                # It may work on: another machine would be its twin.
                error = AttemptFailed(error.failure, f"{error.message}. {stays}")
                raise stage_failure(self._what, error) from error
            raise
        except BaseException:
            # Terminate, Ctrl-C and our own faults alike: no machine is left behind a dead step.
            self._end(handle, Failure.CANCELLED)
            self._tell_story(handle)
            raise
        self._end(handle, "finished")
        return receipt

    def _end(self, handle: Handle, outcome: str) -> str | None:
        """Have the machine gone, and its lease given back: what it did not live to do itself. Returns what
        is to be done where it will not go; why the attempt ended is the more important news."""
        try:
            self._launcher.terminate(handle, str(outcome))
        except TimeoutError as error:
            self._context.log.error(str(error))
            return str(error)
        self._lease(handle.token).release()
        return None

    def _lease(self, token: str) -> LeaseKeeper:
        key = f"{self._state.prefix}/lease.json"
        return LeaseKeeper(self._store, key, token=token, owner="orchestrator", ttl_s=LEASE_TTL_S)

    # ----------------------------------------------------------------------------------------------
    # Launching

    def _adopt(self) -> Handle | None:
        """The machine of an attempt that lives: also one that has no lease, or none any more, because
        it has not come up yet."""
        handle = with_capacity(
            self._context, self._launcher, self._what, lambda: self._launcher.find(self._state.prefix)
        )
        if handle is not None:
            self._context.log.info(f"{self._state.spec.name}: adopted the live attempt {handle.token}")
        return handle

    def _launch(
        self,
        offers: Callable[[], Sequence[Offer]],
        terms: Callable[[Offer], Terms],
        held: contextlib.ExitStack,
    ) -> Handle:
        """A machine that was asked for just now, or was found living after all. Its lease is renewed
        here, in `held`, until its supervisor does that."""
        token = new_token()
        self.machines.append(token)
        lease = self._lease(token)
        prefix = self._state.prefix
        try:
            handle = take_if_silent(self._context, lease, self._what, lambda: self._launcher.find(prefix))
        except StillAlive as alive:
            raise dg.Failure(
                f"{self._what} is being built by {alive}, which this machine cannot reach; its lease ends at "
                f"{alive.lease.expires_at:%H:%M:%S} UTC unless it is renewed",
                allow_retries=False,
            ) from alive
        if handle is not None:
            self._context.log.info(f"{self._state.spec.name}: adopted the live attempt {handle.token}")
            return handle
        try:
            if self._launcher.patience:
                held.enter_context(HeldLease(lease, release=False))
            return with_capacity(
                self._context,
                self._launcher,
                self._what,
                lambda: self._ask_for_machine(token, offers(), terms),
            )
        except BaseException:
            held.close()
            lease.release()
            raise

    def _ask_for_machine(
        self, token: str, offers: Sequence[Offer], terms: Callable[[Offer], Terms]
    ) -> Handle:
        """The first offer that can be had. Raises AttemptFailed with every refusal."""
        refusals = []
        for offer in offers:
            raise_if_cancelled(self._context)
            try:
                handle = self._launcher.launch(self._job(token, offer, terms(offer)), offer)
            except AttemptFailed as error:
                if error.failure is not Failure.NO_CAPACITY:
                    raise
                self._context.log.info(f"{self._what}: {offer.name} cannot be had: {error.message}")
                refusals.append(f"{offer.name}: {error.message}")
                continue
            self._tell_launch(handle, offer)
            return handle
        raise AttemptFailed(Failure.NO_CAPACITY, f"none of {len(refusals)} offers: {'; '.join(refusals)}")

    def _tell_launch(self, handle: Handle, offer: Offer) -> None:
        self._context.log.info(f"{self._state.spec.name}: launched attempt {handle.token} on {offer.name}")
        if handle.url:
            self._context.log_event(
                dg.AssetObservation(
                    asset_key=self._context.asset_key,
                    partition=self._recipe.name,
                    description=f"attempt {handle.token} is on {offer.name}",
                    metadata={
                        "machine": dg.MetadataValue.url(handle.url),
                        "offer": offer.name,
                        "usd_per_h": offer.price_usd_per_h,
                    },
                )
            )

    def _job(self, token: str, offer: Offer, terms: Terms) -> TrainingJob:
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
        text = shard_files(self._store, recipe) if stage == "base" else None
        previous = receipts.get({"midtrain": "base", "sft": "midtrain"}.get(stage, ""))
        data = receipts.get({"midtrain": "midtrain_data", "sft": "sft_data"}.get(stage, ""))
        tokens = attempts(self._store, self._state.prefix)
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
            shards=text.train if text else (),
            validation=text.validation if text else None,
            urls=dict(text.urls) if text else {},
            tokenizer=tokenizer.output("tokenizer.json"),
            init_checkpoint=previous.outputs if previous else (),
            conversations=conversation_files(data) if data else {},
            hardware=self._launcher.hardware(recipe.hardware, offer),
            deadline_s=terms.deadline_s,
            watch_grace_s=WATCH_GRACE_S,
            code_revision=code_revision(project_root()),
            sources_sha256=sources_digest(self._state.spec.sources),
            rented=self._launcher.rent(offer, terms.max_usd),
            image=self._launcher.image(),
            paid=stage_dollars(self._store, self._state.prefix, tokens),
        )

    # ----------------------------------------------------------------------------------------------
    # Watching

    def _watch(self, handle: Handle, lease: contextlib.ExitStack) -> Event | None:
        """Pump events until the attempt says how it ended, or its machine is gone.

        Raises AttemptFailed where the machine is given up: it does not come up (NOT_READY), or is not
        heard of any more (LOST).
        """
        attempt = attempt_prefix(self._state.prefix, handle.token)
        stage = self._state.spec.name
        summary = saved = read_summary(self._store, self._state.prefix, handle.token)
        stream = EventStream(self._store, f"{attempt}/events.jsonl")
        reader = EventStreamReader(stream, Cursor(offset=saved.offset))
        report = LiveReport(self._context, stage, live_metrics_key(self._recipe.name, stage))
        heartbeat = self._heartbeat(handle)
        check_at = 0.0
        with dg.open_pipes_session(self._context, NoContext(), reader):
            while True:
                alive = self._launcher.alive(handle)
                events = reader.pump()
                summary = summary.after(events, reader.cursor)
                for event in events:
                    report.tell(event)
                    if event["type"] in ENDINGS:
                        if heartbeat is None:
                            self._wait_until_gone(handle)
                        return event
                if not alive:
                    return None
                self._watch_lease.check()
                if time.monotonic() >= check_at:
                    check_at = time.monotonic() + _STATUS_EVERY_S
                    raise_if_cancelled(self._context)
                    if heartbeat and heartbeat.look():
                        lease.close()  # its supervisor renews it from now on
                    if summary != saved:
                        saved = summary
                        write_summary(self._store, self._state.prefix, handle.token, saved)
                time.sleep(_POLL_S)

    def _heartbeat(self, handle: Handle) -> Heartbeat | None:
        patience = self._launcher.patience
        if patience is None:
            return None
        key = f"{self._state.prefix}/lease.json"
        return Heartbeat(self._store, key, self._launcher, handle, patience)

    def _wait_until_gone(self, handle: Handle) -> None:
        deadline = time.monotonic() + 15
        while self._launcher.alive(handle) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _verify(self, handle: Handle, ending: Event | None) -> Receipt:
        spec, fingerprint = self._state.spec, self._state.fingerprint
        assert fingerprint is not None
        if ending is not None and ending["type"] == "failed":
            failure = Failure(ending["failure"])
            raise AttemptFailed(failure, ending["message"] + _NEXT_STEPS.get(failure, ""))
        receipt = read_receipt(self._store, spec.name, fingerprint)
        if receipt is None or receipt.token != handle.token:
            words = self._launcher.last_words(handle)
            raise AttemptFailed(
                Failure.LOST,
                f"the supervisor of attempt {handle.token} is gone and left no receipt. {words}".rstrip(),
            )
        problems = missing_outputs(self._store, receipt)
        if problems:
            raise AttemptFailed(
                Failure.FAILED,
                f"the receipt of {spec.name} does not hold: {'; '.join(problems)}. Run it again",
            )
        return receipt

    def _tell_story(self, handle: Handle) -> None:
        """On the stage's page: this attempt is over without a receipt, and what came before it.

        Where the store cannot be read the log says so: why the attempt ended is the more important news.
        """
        try:
            rows = list(attempt_rows(self._store, self._state.prefix))
        except (StoreError, ValueError, OSError) as error:
            self._context.log.warning(f"what the attempts have done cannot be read: {error}")
            return
        last = next(row for row in rows if row["attempt"] == handle.token)
        paid: dict[str, Any] = {name: last[name] for name in ("offer", "usd") if name in last}
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
                    **paid,
                    "attempts": dg.MetadataValue.md(table(rows)),
                },
            )
        )


class Heartbeat:
    """Whether a rented machine works, told by the lease that its supervisor renews: a provider's word
    that it runs says nothing."""

    def __init__(
        self, store: ObjectStore, key: str, launcher: Launcher, handle: Handle, patience: Patience
    ) -> None:
        self._store = store
        self._key = key
        self._launcher = launcher
        self._handle = handle
        self._patience = patience
        self._ready = False
        self._renewed: object = None
        self._since = time.monotonic()
        self._trouble_at = time.monotonic() + _TROUBLE_EVERY_S

    def look(self) -> bool:
        """Whether the supervisor has taken the lease. Raises AttemptFailed: NOT_READY, LOST."""
        lease = read_lease(self._store, self._key)
        mine = lease is not None and lease.token == self._handle.token and lease.owner == "supervisor"
        now = time.monotonic()
        if mine and lease and lease.expires_at != self._renewed:
            self._ready, self._renewed, self._since = True, lease.expires_at, now
        silent_s = now - self._since
        if not self._ready:
            trouble = None
            if now >= self._trouble_at:
                self._trouble_at = now + _TROUBLE_EVERY_S
                trouble = self._launcher.trouble(self._handle)
            if silent_s > self._patience.ready_s:
                trouble = trouble or f"not heard of within {silent_s:.0f} s of its launch"
            if trouble:
                raise AttemptFailed(Failure.NOT_READY, f"the machine does not come up: {trouble}")
        elif silent_s > self._patience.silent_s:
            raise AttemptFailed(
                Failure.LOST,
                f"the machine has not been heard of for {silent_s:.0f} s. "
                f"{self._launcher.last_words(self._handle)}".rstrip(),
            )
        return self._ready


def attempt_rows(store: ObjectStore, prefix: str) -> Iterator[dict[str, str | int | float | None]]:
    """Every attempt at a stage as a line of a table; where any was paid for, with offers and dollars."""
    told = summaries(store, prefix)
    paid = {token: entry for token in told if (entry := read_entry(store, token))}
    for token, summary in told.items():
        row: dict[str, str | int | float | None] = dict(summary.row(token))
        if paid:
            entry = paid.get(token)
            row["offer"] = entry.offer if entry else None
            row["usd"] = round(entry.dollars(), 4) if entry else 0.0
            if entry and summary.ended is None and entry.outcome:
                row["ended"] = entry.outcome
        yield row
