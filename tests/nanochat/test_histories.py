"""Any history of orchestrators and supervisors, told in the store's documents alone.

Two orchestrators on two machines whose clocks differ want the stages of one model, with force or
without, and die at any moment; so do the supervisors that they start; live attempts are adopted, outputs
get lost, documents turn to garbage. Nothing trains here. Leases, receipts, pointers and freshness are
the real ones; what the actors do with them follows `dagster_nanochat.lifecycle` and
`nanochat.supervisor` step by step.

``HISTORIES=20000 pytest tests/nanochat/test_histories.py`` tells more of them than CI does.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from standins.memory_store import MemoryStore

from nanochat import stages
from nanochat.data.shards import ShardRecord
from nanochat.data.sources import get_source
from nanochat.recipes import Base, Data, Model, Recipe, Tokenizer
from nanochat.stages import StageState, Status, resolve
from nanochat.store.documents import DocumentError
from nanochat.store.layout import shard_record_key
from nanochat.store.leases import Lease, LeaseHeld, LeaseKeeper, LeaseLost
from nanochat.store.receipts import FileRef, InputRef, Receipt, point, read_receipt, write_receipt

STAGES = ("tokenizer", "base")
TTL_S, RENEW_EVERY_S, GRACE_S = 30.0, 5.0, 120.0
MACHINES = ("one", "two")
RECIPE = Recipe(
    name="model",
    description="for histories",
    data=Data(source="fineweb-edu", shards=1),
    tokenizer=Tokenizer(vocab_size=300, shards=1),
    model=Model(depth=1, width=16, heads=1, kv_heads=1, context=32),
    base=Base(steps=10, batch_tokens=64),
)


def shard_records() -> dict[str, bytes]:
    """A store that knows the recipe's shards by what their hub says of them."""
    objects = {}
    for shard in ("shard_00000", get_source("fineweb-edu").validation_shard()):
        record = ShardRecord(
            source="fineweb-edu",
            shard=shard,
            mode="reference",
            revision="r1",
            url="https://hub.example/shard",
            size_bytes=1,
            sha256="0" * 64,
            rows=None,
            empty=None,
            characters=None,
            seconds=0.0,
        )
        objects[shard_record_key("fineweb-edu", shard)] = record.to_bytes()
    return objects


@dataclasses.dataclass
class Supervisor:
    """An attempt that is alive. inputs: the receipts that it was started on."""

    stage: str
    machine: int
    token: str
    fingerprint: str
    inputs: tuple[InputRef, ...]
    lease: LeaseKeeper
    prefix: str
    renewed_at: float
    watched_at: float
    watch_seen: bytes | None = None


@dataclasses.dataclass
class Orchestrator:
    """A run that wants a stage. seen: the receipt when it began; attempt: the token it watches."""

    stage: str
    machine: int
    forced: bool
    seen: Receipt | None
    watch: LeaseKeeper
    lease: LeaseKeeper
    watching: bool = False
    attempt: str | None = None
    renewed_at: float = 0.0


class Histories(RuleBasedStateMachine):
    """See the module's text."""

    SHARDS = shard_records()

    @initialize(skew_s=st.sampled_from([-60.0, 0.0, 60.0]))
    def begin(self, skew_s: float) -> None:
        self.store = MemoryStore(self.SHARDS)
        self.now = 0.0
        self.skews = (0.0, skew_s)
        self.runs: dict[int, Orchestrator] = {}
        self.attempts: dict[str, Supervisor] = {}
        self.tokens = (f"t{number:04d}" for number in itertools.count())
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(stages, "utc_now", lambda: self.clock(0))

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.ends_well()
        finally:
            self.patch.undo()

    # -- the world -------------------------------------------------------------------------------

    def clock(self, machine: int) -> datetime.datetime:
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        return start + datetime.timedelta(seconds=self.now + self.skews[machine])

    def keeper(self, key: str, token: str, machine: int) -> LeaseKeeper:
        return LeaseKeeper(
            self.store,
            key,
            token=token,
            owner=token,
            ttl_s=TTL_S,
            clock=lambda: self.clock(machine),
            monotonic=lambda: self.now,
            host=MACHINES[machine],
        )

    def states(self) -> dict[str, StageState]:
        return resolve(RECIPE, self.store)

    # -- what happens ----------------------------------------------------------------------------

    @rule(machine=st.sampled_from([0, 1]), stage=st.sampled_from(STAGES), forced=st.booleans())
    def want(self, machine: int, stage: str, forced: bool) -> None:
        """A run begins, unless one is under way on that machine (its slot is taken)."""
        states = self.states()
        state = states[stage]
        if machine in self.runs or not all(states[up].good for up in state.spec.upstream):
            return
        if state.good and not forced:
            return
        token, prefix = next(self.tokens), state.prefix
        watch = self.keeper(f"{prefix}/watch.json", f"run {token}", machine)
        lease = self.keeper(f"{prefix}/lease.json", token, machine)
        self.runs[machine] = Orchestrator(stage, machine, forced, state.receipt, watch, lease)

    @rule(seconds=st.sampled_from([0.5, 4.0, 20.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        """In steps no longer than what is renewed; everybody who lives goes on meanwhile."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 2.5)
            for attempt in list(self.attempts.values()):
                self.keep_up(attempt)
            for run in list(self.runs.values()):
                try:
                    self.go_on(run)
                except DocumentError:
                    self.runs.pop(run.machine)  # it fails, naming the document

    def keep_up(self, attempt: Supervisor) -> None:
        watch = self.store.objects.get(f"{attempt.prefix}/watch.json")
        if watch != attempt.watch_seen:
            attempt.watch_seen, attempt.watched_at = watch, self.now
        if self.now - attempt.watched_at > GRACE_S:
            attempt.lease.release()
            del self.attempts[attempt.token]
        elif self.now - attempt.renewed_at >= RENEW_EVERY_S:
            try:
                attempt.lease.renew()
                attempt.renewed_at = self.now
            except (LeaseLost, DocumentError):  # what it cannot read, it cannot hold
                del self.attempts[attempt.token]

    def go_on(self, run: Orchestrator) -> None:
        if run.watching and self.now - run.renewed_at >= TTL_S / 4:
            try:
                run.watch.renew()
                run.renewed_at = self.now
            except LeaseLost:
                del self.runs[run.machine]  # another run watches now, and has the machine
                return
        if not run.watching:
            try:
                run.watch.take()
            except LeaseHeld:
                return
            run.watching, run.renewed_at = True, self.now
            state = self.states()[run.stage]
            rebuilt = state.receipt is not None and state.receipt != run.seen
            if state.good and (rebuilt or not run.forced):
                self.end(run)
        elif run.attempt is None:
            self.launch_or_adopt(run)
        elif run.attempt not in self.attempts:
            self.end(run)

    def launch_or_adopt(self, run: Orchestrator) -> None:
        states = self.states()
        state = states[run.stage]
        if not all(states[up].good for up in state.spec.upstream):
            self.end(run)  # it fails by name
            return
        try:
            taken = run.lease.take()
        except LeaseHeld as held:
            attempt = self.attempts.get(held.lease.token)
            if attempt is not None and attempt.machine == run.machine:
                run.attempt = attempt.token
            return
        assert state.identity is not None
        self.store.put(state.identity.key(), state.identity.to_bytes())
        inputs = tuple(
            InputRef(stage=up, fingerprint=receipt.fingerprint, receipt_sha256=receipt.digest())
            for up in state.spec.upstream
            if (receipt := states[up].receipt) is not None
        )
        self.attempts[taken.token] = Supervisor(
            stage=run.stage,
            machine=run.machine,
            token=taken.token,
            fingerprint=state.identity.fingerprint,
            inputs=inputs,
            lease=self.keeper(f"{state.prefix}/lease.json", taken.token, run.machine),
            prefix=state.prefix,
            renewed_at=self.now,
            watched_at=self.now,
        )
        run.attempt = taken.token

    def end(self, run: Orchestrator) -> None:
        run.watch.release()
        self.runs.pop(run.machine, None)

    @precondition(lambda self: self.attempts)
    @rule(which=st.integers(0, 3))
    def an_attempt_finishes(self, which: int) -> None:
        attempt = sorted(self.attempts.values(), key=lambda a: a.token)[which % len(self.attempts)]
        del self.attempts[attempt.token]
        try:
            attempt.lease.renew()
        except LeaseLost:
            return
        output = f"{attempt.prefix}/checkpoints/{attempt.token}/weights"
        self.store.put(output, attempt.token.encode())
        receipt = Receipt(
            stage=attempt.stage,
            stage_version=1,
            fingerprint=attempt.fingerprint,
            token=attempt.token,
            created_at=self.clock(attempt.machine),
            seconds=1.0,
            inputs=attempt.inputs,
            outputs=(FileRef(key=output, size_bytes=len(attempt.token), sha256="0" * 64),),
        )
        write_receipt(self.store, receipt)
        point(self.store, RECIPE.name, attempt.stage, attempt.fingerprint)
        attempt.lease.release()

    @precondition(lambda self: self.attempts)
    @rule(which=st.integers(0, 3))
    def a_supervisor_is_killed(self, which: int) -> None:
        del self.attempts[sorted(self.attempts)[which % len(self.attempts)]]

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 1))
    def an_orchestrator_is_killed(self, which: int) -> None:
        del self.runs[sorted(self.runs)[which % len(self.runs)]]

    @rule(stage=st.sampled_from(STAGES))
    def an_output_is_lost(self, stage: str) -> None:
        receipt = self.states()[stage].receipt
        if receipt is not None:
            self.store.delete(receipt.outputs[0].key)

    @rule(
        stage=st.sampled_from(STAGES), name=st.sampled_from(["lease", "watch", "receipt"]), cut=st.booleans()
    )
    def a_document_turns_to_garbage(self, stage: str, name: str, cut: bool) -> None:
        """Nobody uses it, everybody who needs it names it; in the end somebody moves it away, as told."""
        key = f"{self.states()[stage].prefix}/{name}.json"
        data = self.store.objects.get(key)
        if data is None:
            return
        self.store.objects[key] = data[: len(data) // 2] if cut else data.replace(b'"token"', b'"tokem"')
        with pytest.raises(DocumentError, match=key):
            (Receipt if name == "receipt" else Lease).read(self.store, key)
        if name == "receipt":
            with pytest.raises(DocumentError, match=key):
                self.states()
        self.time_passes(40.0)
        self.store.delete(key)

    # -- what holds ------------------------------------------------------------------------------

    @invariant()
    def one_attempt_at_a_time_works_on_a_stage(self) -> None:
        working = [attempt.prefix for attempt in getattr(self, "attempts", {}).values()]
        assert len(working) == len(set(working)), working

    @invariant()
    def what_is_fresh_stands_on_what_is_current(self) -> None:
        if not hasattr(self, "store"):
            return
        states = self.states()
        for name, state in states.items():
            if not state.good:
                continue
            receipt = state.receipt
            assert receipt is not None
            assert (receipt.stage, receipt.fingerprint) == (name, state.fingerprint)
            assert all(self.store.head(file.key) for file in receipt.outputs)
            for used in receipt.inputs:
                current = read_receipt(self.store, used.stage, used.fingerprint)
                assert current is not None
                assert current.digest() == used.receipt_sha256
                assert states[used.stage].good

    def ends_well(self) -> None:
        """Nobody dies any more: a run after the other brings every stage to a good receipt."""
        for stage in STAGES:
            for _ in range(20):
                self.want(0, stage, False)
                self.time_passes(40.0)
                while self.attempts:
                    self.an_attempt_finishes(0)
                self.time_passes(2.0)
                if self.states()[stage].status is Status.FRESH:
                    break
        assert {state.status for state in self.states().values()} == {Status.FRESH}


pytestmark = pytest.mark.timeout(900)
TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=int(os.environ.get("HISTORIES", "2000")),
    stateful_step_count=25,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
