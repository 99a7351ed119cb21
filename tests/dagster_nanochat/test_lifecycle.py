"""A training stage's life with real supervisors and real training: waiting, adopting, ending."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import psutil
import pytest
from standins.waiting import wait_for

from dagster_nanochat.attempts import cancel_attempt, print_logs
from nanochat.stages import resolve
from nanochat.store import FileStore
from nanochat.store.leases import LeaseKeeper, read_lease, utc_now
from nanochat.store.receipts import current_receipt, read_receipt, write_receipt
from nanochat.training.job import TrainingJob

SLOT = f"slots/{socket.gethostname()}/0.json"
# A run in a process of its own: Dagster sets logging up anew for each, which several threads of one
# process do not survive. Its leases end soon after it is killed.
ORCHESTRATOR = """
import json, sys
import dagster as dg
from dagster_nanochat import lifecycle
from test_lifecycle import execute
lifecycle.HELD_TTL_S = 3.0
execute(dg.DagsterInstance.get(), **json.loads(sys.argv[1]))
"""


def execute(
    instance: dg.DagsterInstance, run_id: str, asset: str, tags: dict[str, str], config: dict[str, Any]
) -> None:
    from dagster_nanochat.definitions import defs

    dg.Definitions(
        assets=defs().assets,
        resources=defs().resources,
        jobs=[dg.define_asset_job("one", selection=[asset])],
        executor=dg.in_process_executor,
    ).resolve_job_def("one").execute_in_process(
        instance=instance,
        run_id=run_id,
        tags=tags,
        run_config={"ops": {asset: {"config": config}}} if config else None,
        raise_on_error=False,
    )


class Run:
    """A run of one asset for one model, in a thread or in a process of its own."""

    def __init__(self, instance: dg.DagsterInstance, *, in_process: bool = False, **how: Any) -> None:
        self.id = str(uuid.uuid4())
        self._instance = instance
        how["run_id"] = self.id
        self.process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if in_process:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", ORCHESTRATOR, json.dumps(how)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))},
                stderr=subprocess.DEVNULL,
            )
        else:
            self._thread = threading.Thread(target=execute, args=(instance,), kwargs=how, daemon=True)
            self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive() if self._thread else self.process.poll() is None

    def said(self, text: str) -> bool:
        records = self._instance.all_logs(self.id)
        told = (record.user_message or (record.dagster_event or record).message for record in records)
        return any(text in (words or "") for words in told)

    def cancel(self) -> None:
        run = self._instance.get_run_by_id(self.id)
        if run is not None and not run.is_finished:
            self._instance.report_run_canceling(run)

    def end(self, *, within_s: float = 60.0) -> Run:
        wait_for(lambda: not self.running, within_s=within_s)
        return self

    @property
    def status(self) -> dg.DagsterRunStatus:
        return self._instance.get_run_by_id(self.id).status

    @property
    def succeeded(self) -> bool:
        return self.status is dg.DagsterRunStatus.SUCCESS

    @property
    def reused(self) -> bool:
        (event,) = (event for event in self._events() if event.is_step_materialization)
        return event.materialization.metadata["reused"].value

    @property
    def reason(self) -> str:
        """Why it failed."""
        (event,) = (event for event in self._events() if event.is_step_failure)
        return event.step_failure_data.user_failure_data.description

    def _events(self) -> list[dg.DagsterEvent]:
        records = self._instance.all_logs(self.id)
        return [record.dagster_event for record in records if record.dagster_event]


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    """A store with the tiny models' shards and tokenizer, and a Dagster history."""
    from dagster_nanochat.definitions import defs

    root = tmp_path_factory.mktemp("project").resolve()
    home = tmp_path_factory.mktemp("dagster")
    module_environment.setenv("NANOCHAT_STORE", str(root / "data" / "store"))
    store = FileStore(root / "data" / "store")
    with dg.instance_for_test(temp_dir=str(home)) as instance:
        module_environment.setenv("DAGSTER_HOME", str(home))
        ingested = (
            defs()
            .resolve_job_def("ingest_shards")
            .execute_in_process(
                instance=instance,
                tags={
                    "dagster/asset_partition_range_start": "tinytext_part_0",
                    "dagster/asset_partition_range_end": "tinytext_part_1",
                },
            )
        )
        assert ingested.success
        tags = {"dagster/partition": "tiny"}
        for asset in ("validation_files", "tokenizer_training"):
            assert Run(instance, asset=asset, tags=tags, config={}).end().succeeded
        yield SimpleNamespace(instance=instance, store=store)


@pytest.fixture
def run(project: SimpleNamespace) -> Iterator[Callable[..., Run]]:
    """run(model, asset, tags=…, in_process=…, config…): started at once, ended with the test."""
    started: list[Run] = []

    def start(
        model: str,
        asset: str = "base_model_checkpoint",
        *,
        tags: dict[str, str] | None = None,
        in_process: bool = False,
        **config: Any,
    ) -> Run:
        tags = {"dagster/partition": model, **(tags or {})}
        one = Run(project.instance, in_process=in_process, asset=asset, tags=tags, config=config)
        started.append(one)
        return one

    yield start
    for one in started:
        if one.running:
            one.cancel()
            one.end()


def state_of(project: SimpleNamespace, model: str, stage: str = "base") -> Any:
    from dagster_nanochat.partitions import recipe_book

    return resolve(recipe_book()[model], project.store)[stage]


def jobs_of(project: SimpleNamespace, model: str) -> list[TrainingJob]:
    prefix = state_of(project, model).prefix
    keys = [info.key for info in project.store.list(f"{prefix}/attempts/") if info.key.endswith("/job.json")]
    return [TrainingJob.read(project.store, key) for key in keys]


def supervisor_of(project: SimpleNamespace, model: str) -> psutil.Process:
    """The supervisor that has the stage's lease, once training is under way below it."""

    def found() -> psutil.Process | None:
        lease = read_lease(project.store, f"{state_of(project, model).prefix}/lease.json")
        if lease is None or lease.owner != "supervisor" or not lease.live(utc_now()):
            return None
        process = psutil.Process(lease.pid)
        return process if len(process.children(recursive=True)) >= 2 else None

    return wait_for(found)


@pytest.fixture
def busy(project: SimpleNamespace) -> Iterator[LeaseKeeper]:
    """Somebody uses this machine's slot until the test lets go."""
    keeper = LeaseKeeper(project.store, SLOT, token="other", owner="base of another", ttl_s=60)
    keeper.take()
    yield keeper
    keeper.release()


def test_a_waiting_stage_says_what_for_and_ends_within_seconds_of_terminate(
    run: Callable[..., Run], busy: LeaseKeeper
) -> None:
    waiting = run("slow")
    wait_for(lambda: waiting.said("base of slow waits: base of another on "))
    cancelled = time.monotonic()
    waiting.cancel()
    assert waiting.end().status is dg.DagsterRunStatus.CANCELED
    assert time.monotonic() - cancelled < 5


def test_two_runs_that_want_the_same_stage_train_it_once(
    project: SimpleNamespace, run: Callable[..., Run], busy: LeaseKeeper
) -> None:
    runs = run("tiny"), run("twin", in_process=True), run("tiny", in_process=True, force=True)
    for one in runs:
        wait_for(lambda one=one: one.said("waits: "))
    busy.release()
    assert all(one.end().succeeded for one in runs)
    assert sorted(one.reused for one in runs) == [False, True, True]
    assert len(jobs_of(project, "tiny")) == 1
    assert current_receipt(project.store, "twin", "base") == current_receipt(project.store, "tiny", "base")


def test_terminating_a_run_ends_its_processes(project: SimpleNamespace, run: Callable[..., Run]) -> None:
    training = run("slow", tags={"nanochat/max_hours": "100"})
    supervisor = supervisor_of(project, "slow")
    family = [supervisor, *supervisor.children(recursive=True)]
    assert jobs_of(project, "slow")[-1].deadline_s == 4 * 100 * 3600
    log = Path(f"/proc/{supervisor.pid}/fd/2").resolve()
    training.cancel()
    assert training.end().status is dg.DagsterRunStatus.CANCELED
    assert psutil.wait_procs(family, timeout=1)[1] == []
    assert not log.exists()


def test_a_live_attempt_is_shown_and_cancelled_through_the_store_alone(
    project: SimpleNamespace, run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    training = run("slow", tags={"nanochat/max_hours": "100"})
    supervisor_of(project, "slow")
    assert cancel_attempt("slow", "base") == 0
    assert re.search("has stopped; the next run goes on from its last checkpoint$", capsys.readouterr().out)
    assert "base of slow ended with CANCELLED: asked to stop by " in training.end().reason
    assert print_logs("slow", "base", follow=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  base: attempt \S+ on \S+ \(pid \d+\)", lines[0])
    assert re.match(r"\d\d:\d\d:\d\d  base: ended with CANCELLED: asked to stop by ", lines[-1])
    assert cancel_attempt("slow", "base") == 1
    assert capsys.readouterr().err == "error: nothing works on base of slow now\n"


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        ("tiny", "tokenizer", "tiny has no training stage 'tokenizer'; it has: base, midtrain, sft"),
        ("none", "base", "unknown model 'none'"),
        ("tiny", "sft", "sft of tiny "),
    ],
)
def test_logs_of_what_there_is_not_say_so(
    project: SimpleNamespace, model: str, stage: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_logs(model, stage, follow=False) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_stage_whose_supervisor_is_killed_is_lost(
    project: SimpleNamespace, run: Callable[..., Run]
) -> None:
    training = run("slow")
    supervisor = supervisor_of(project, "slow")
    family = supervisor.children(recursive=True)
    supervisor.kill()
    assert "ended with LOST: the supervisor of attempt" in training.end().reason
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_the_lease_of_a_process_that_is_gone_is_waited_out(
    project: SimpleNamespace, run: Callable[..., Run]
) -> None:
    key = f"{state_of(project, 'slow').prefix}/lease.json"
    project.store.delete(key)  # a test before may have left the real one
    LeaseKeeper(project.store, key, token="gone", owner="supervisor", ttl_s=6).take()
    training = run("slow")
    wait_for(lambda: training.said("is gone without a word; its lease ends at"))
    wait_for(lambda: training.said("launched attempt"))
    assert utc_now() >= read_lease(project.store, key).taken_at
    assert read_lease(project.store, key).token != "gone"


def test_a_run_that_finds_a_live_attempt_goes_on_where_the_dead_run_stopped(
    project: SimpleNamespace, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_nanochat import lifecycle
    from dagster_nanochat.pipes import load_cursor

    monkeypatch.setattr(lifecycle, "HELD_TTL_S", 3.0)
    first = run("slow", in_process=True)
    supervisor = supervisor_of(project, "slow")
    prefix = state_of(project, "slow").prefix
    attempt = f"{prefix}/attempts/{read_lease(project.store, f'{prefix}/lease.json').token}"
    wait_for(lambda: first.said("base step 1/"), within_s=90)
    told = project.store.head(f"{attempt}/events.jsonl").size
    wait_for(lambda: load_cursor(project.store, f"{attempt}/reading.json").offset >= told)
    first.process.kill()
    first.process.wait()
    assert project.instance.get_run_by_id(first.id).status is dg.DagsterRunStatus.STARTED
    second = run("slow")
    wait_for(lambda: second.said("adopted the live attempt"))
    wait_for(lambda: second.said("base step "))
    assert not second.said("base step 1/")
    assert supervisor.is_running()
    assert project.instance.get_run_by_id(first.id).status is dg.DagsterRunStatus.FAILURE
    assert first.said(f"run {second.id} has taken over base of slow")
    second.cancel()
    assert second.end().status is dg.DagsterRunStatus.CANCELED
    assert not supervisor.is_running()


def test_a_stage_that_takes_several_times_its_cap_is_stopped(run: Callable[..., Run]) -> None:
    reason = run("tiny", force=True, max_hours=0.0002).end().reason
    assert "ended with DEADLINE: ran for" in reason
    assert "Raise the cap (nanochat/max_hours, or max_hours)" in reason


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"nanochat/max_hours": "soon"}, "run tag nanochat/max_hours='soon' is not a number above 0"),
        ({"nanochat/max_hours": "-1"}, "is not a number above 0"),
        ({"nanochat/max_hours": "1e-6"}, "above the cap of 1e-06 h"),
        (
            {"nanochat/force": "base, stf"},
            "run tag nanochat/force: no stage is called 'stf'; there are tokenizer, ",
        ),
    ],
)
def test_a_tag_that_forbids_or_means_nothing_is_told(
    run: Callable[..., Run], tags: dict[str, str], expected: str
) -> None:
    assert expected in run("slow", tags=tags).end().reason


@pytest.mark.parametrize("name", ["NANOCHAT_THREADS", "NANOCHAT_PROCESSES"])
def test_a_setting_that_is_no_number_is_refused_by_name(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "two")
    assert f"BAD_REQUEST: {name}='two' is not a number above 0" in run("slow").end().reason


def test_prices_are_compared_with_the_cap_in_dollars(project: SimpleNamespace) -> None:
    from dagster_nanochat.guards import StageConfig, check_estimate, deadline_s
    from dagster_nanochat.launch.base import Offer
    from dagster_nanochat.partitions import recipe_book
    from nanochat.plan import plan_stage

    recipe = recipe_book()["slow"]
    offer = Offer(name="rented", price_usd_per_h=2.0, flops_per_s=1e9)
    states = resolve(recipe, project.store)
    plan = plan_stage(recipe, "base", states, project.store, flops_per_s=1e9, usd_per_h=2.0)
    assert plan.dollars > 4
    context = SimpleNamespace(run=SimpleNamespace(tags={"nanochat/max_usd": "4"}))
    with pytest.raises(
        dg.Failure, match=rf"estimated at \${plan.dollars:.2f} on rented, above the cap of \$4"
    ):
        check_estimate(context, StageConfig(), recipe, plan, offer)
    assert deadline_s(context, StageConfig(), offer) == 2 * 3600


@pytest.mark.parametrize(("steps", "eval_every"), [(21_400, 250), (12, 6), (70_000, 250), (99, 1), (5, 1)])
def test_a_live_asset_gets_a_hundred_points_at_most_and_always_the_last(steps: int, eval_every: int) -> None:
    from dagster_nanochat.pipes import LiveReport

    seen: list[dict[str, float]] = []

    def keep(observation: dg.AssetObservation) -> None:
        seen.append({name: value.value for name, value in observation.metadata.items()})

    context = SimpleNamespace(log=SimpleNamespace(info=lambda text: None), log_event=keep)
    report = LiveReport(context, "base", dg.AssetKey("x"))
    for step in range(1, steps + 1):
        report.tell({"type": "step", "time": 0, "step": step, "steps": steps, "loss": 1.0})
        if step % eval_every == 0 and step < steps:
            report.tell({"type": "eval", "time": 0, "step": step, "metrics": {"val_bpb": 1.0}})
    report.tell({"type": "eval", "time": 0, "step": steps, "metrics": {"val_bpb": 1.0}})
    assert len(seen) <= 100
    shown = {kind: [point["step"] for point in seen if kind in point] for kind in ("loss", "val_bpb")}
    assert (shown["loss"][0], shown["loss"][-1], shown["val_bpb"][-1]) == (1, steps, steps)
    assert len(shown["val_bpb"]) >= min(48, (steps - 1) // eval_every)


def test_a_tokenizer_that_another_run_builds_meanwhile_is_not_built_again(
    project: SimpleNamespace, run: Callable[..., Run]
) -> None:
    state = state_of(project, "tiny", "tokenizer")
    other = LeaseKeeper(project.store, f"{state.prefix}/lease.json", token="other", owner="run x", ttl_s=60)
    other.take()
    try:
        waiting = run("tiny", "tokenizer_training", force=True)
        wait_for(lambda: waiting.said("tokenizer of tiny waits: run x on "))
        theirs = state.receipt.model_copy(update={"token": "other", "created_at": utc_now()})
        write_receipt(project.store, theirs)
    finally:
        other.release()
    assert waiting.end().succeeded
    assert waiting.reused
    assert read_receipt(project.store, "tokenizer", state.fingerprint).token == "other"


@pytest.mark.parametrize("stolen", [False, True])
def test_the_lease_of_a_long_build_is_renewed_and_without_it_nothing_is_recorded(
    project: SimpleNamespace, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, stolen: bool
) -> None:
    from dagster_nanochat import inprocess, lifecycle
    from dagster_nanochat.defs.tokenizer import assets

    before = state_of(project, "tiny", "tokenizer")
    key = f"{before.prefix}/lease.json"
    build = assets.train_tokenizer

    def long_build(*arguments: Any, **options: Any) -> Any:
        for _ in range(25):
            assert read_lease(project.store, key).live(utc_now())
            time.sleep(0.1)
        if stolen:
            project.store.delete(key)
            time.sleep(0.05)  # a renewal may have been on its way
            project.store.delete(key)
        return build(*arguments, **options)

    monkeypatch.setattr(assets, "train_tokenizer", long_build)
    for module in (inprocess, lifecycle):
        monkeypatch.setattr(module, "HELD_TTL_S", 1.0)
    building = run("tiny", "tokenizer_training", force=True)
    assert building.end().succeeded is not stolen
    if stolen:
        assert "what was made here is not kept" in building.reason
    receipt = read_receipt(project.store, "tokenizer", before.fingerprint)
    assert (receipt == before.receipt) is stolen
