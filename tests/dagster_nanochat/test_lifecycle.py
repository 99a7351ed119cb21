"""A training stage's life with real supervisors and real training: waiting, adopting, ending."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from standins.runs import Run, jobs_of, ready_project, state_of, supervisor_of
from standins.waiting import wait_for

from dagster_nanochat.attempts import cancel_attempt, print_logs
from nanochat.stages import resolve
from nanochat.store.leases import LeaseKeeper, read_lease, utc_now
from nanochat.store.receipts import current_receipt, read_receipt, write_receipt

SLOT = f"slots/{socket.gethostname()}/0.json"


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("project").resolve()
    home = tmp_path_factory.mktemp("dagster")
    with ready_project(str(root / "data" / "store"), home, module_environment) as made:
        yield made


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


def test_two_models_train_one_after_the_other_and_the_waiting_one_can_be_terminated(
    project: SimpleNamespace, run: Callable[..., Run]
) -> None:
    first = run("slow", in_process=True)
    supervisor = supervisor_of(project, "slow")
    second, third = run("killed", in_process=True), run("killed", in_process=True)
    for waiting in (second, third):
        wait_for(lambda waiting=waiting: waiting.said("base of killed waits: base of slow on "))
    cancelled = time.monotonic()
    second.cancel()
    wait_for(lambda: second.status is dg.DagsterRunStatus.CANCELED, within_s=5)
    assert time.monotonic() - cancelled < 5
    assert supervisor.is_running()
    assert jobs_of(project, "killed") == []
    first.cancel()
    wait_for(lambda: third.said("launched attempt"))
    assert first.end().status is dg.DagsterRunStatus.CANCELED
    assert not supervisor.is_running()


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


@pytest.mark.parametrize(
    ("document", "host"), [("lease", None), ("lease", "elsewhere"), ("watch", None), ("watch", "elsewhere")]
)
def test_the_lease_of_what_is_gone_is_waited_out(
    project: SimpleNamespace, run: Callable[..., Run], document: str, host: str | None
) -> None:
    key = f"{state_of(project, 'slow').prefix}/{document}.json"
    project.store.delete(key)  # a test before may have left the real one
    LeaseKeeper(project.store, key, token="gone", owner="somebody", ttl_s=6, host=host).take()
    training = run("slow")
    wait_for(lambda: training.said("may be gone; unless it renews its lease, this run goes on in 6 s"))
    wait_for(lambda: training.said("launched attempt"))
    assert read_lease(project.store, key).token != "gone"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            "lease",
            r"base of slow is being built by somebody on elsewhere \(.*this machine cannot reach",
        ),
        ("watch", r"base of slow is being watched by somebody on elsewhere \(.*; wait for that run or"),
    ],
)
def test_a_stage_that_another_machine_works_on_is_left_to_it(
    project: SimpleNamespace, run: Callable[..., Run], document: str, message: str
) -> None:
    key = f"{state_of(project, 'slow').prefix}/{document}.json"
    project.store.delete(key)
    other = LeaseKeeper(project.store, key, token="other", owner="somebody", ttl_s=60, host="elsewhere")
    other.take()
    try:
        second = run("slow")
        wait_for(lambda: second.said("may be gone; unless it renews its lease"))
        other.renew()
        assert re.search(message, second.end().reason)
    finally:
        other.release()


def test_a_stage_that_takes_several_times_its_cap_is_stopped(run: Callable[..., Run]) -> None:
    reason = run("tiny", force=True, max_hours=0.0002).end().reason
    assert "ended with DEADLINE: ran for" in reason
    assert "Raise the cap (nanochat/max_hours, or max_hours)" in reason


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_disk_that_is_full_fails_the_stage_by_name_and_costs_nothing_once_there_is_room(
    project: SimpleNamespace, run: Callable[..., Run]
) -> None:
    checkpoints = project.store.root / state_of(project, "killed").prefix / "checkpoints"
    checkpoints.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(checkpoints)], check=True)
    try:
        reason = run("killed").end().reason
    finally:
        subprocess.run(["umount", str(checkpoints)], check=True)
    assert re.match(r"base of killed ended with FAILED: .*cannot write .*No space left on device", reason)
    training = run("killed")
    wait_for(lambda: training.said("checkpoint committed"))


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
    from dagster_nanochat.guards import BUDGET_GRACE_S, StageConfig, cap_usd, check_estimate, terms
    from dagster_nanochat.launch.base import Offer
    from dagster_nanochat.partitions import recipe_book
    from nanochat.plan import plan_stage

    recipe = recipe_book()["slow"]
    offer = Offer(name="rented", price_usd_per_h=2.0, flops_per_s=1e9)
    states = resolve(recipe, project.store)
    plan = plan_stage(recipe, "base", states, project.store, flops_per_s=1e9, usd_per_h=2.0)
    assert plan.dollars > 4
    context = SimpleNamespace(run=SimpleNamespace(tags={"nanochat/max_usd": "4"}))
    cap = cap_usd(context, StageConfig(), project.store, recipe)
    with pytest.raises(
        dg.Failure, match=rf"estimated at \${plan.dollars:.2f} on rented, above the cap of \$4"
    ):
        check_estimate(context, StageConfig(), recipe, plan, offer, cap)
    agreed = terms(context, StageConfig(), offer, cap)
    assert (agreed.max_usd, agreed.deadline_s) == (4.0, 2 * 3600 + BUDGET_GRACE_S)


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
    from dagster_nanochat import holding
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
    monkeypatch.setattr(holding, "HELD_TTL_S", 1.0)
    building = run("tiny", "tokenizer_training", force=True)
    assert building.end().succeeded is not stolen
    if stolen:
        assert "what was made here is not kept" in building.reason
    receipt = read_receipt(project.store, "tokenizer", before.fingerprint)
    assert (receipt == before.receipt) is stolen
