"""What dies in the middle of a stage, and what the same command makes of it, in a folder and in a bucket."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import psutil
import pytest
from standins import s3
from standins.runs import Run, jobs_of, ready_project, state_of, supervisor_of
from standins.waiting import wait_for

from nanochat.attempts import attempts, read_summary
from nanochat.events import Cursor, EventStream
from nanochat.store.leases import read_lease
from nanochat.training.checkpoint_folders import MANIFEST

pytestmark = pytest.mark.timeout(300)
NO_S3 = pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed")


@pytest.fixture(scope="module", params=["folder", pytest.param("bucket", marks=NO_S3)])
def project(request, tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    """A store with the tiny models' shards and tokenizer, and a Dagster history."""
    root = tmp_path_factory.mktemp("project").resolve()
    home = tmp_path_factory.mktemp("dagster")
    module_environment.setenv("NANOCHAT_CACHE", str(root / "cache"))
    module_environment.setattr("dagster_nanochat.views.project_root", lambda: root)
    if request.param == "folder":
        with ready_project(str(root / "data" / "store"), home, module_environment) as made:
            yield made
        return
    with s3.serve(tmp_path_factory.mktemp("s3") / "data") as server:
        for name, value in server.environment.items():
            module_environment.setenv(name, value)
        with ready_project(f"s3://{s3.BUCKET}/models", home, module_environment) as made:
            yield made


def events(project: SimpleNamespace, model: str, token: str) -> list[dict[str, Any]]:
    prefix = state_of(project, model).prefix
    return EventStream(project.store, f"{prefix}/attempts/{token}/events.jsonl").all()


def steps(told: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in told if e["type"] == "step"}


def checkpoint_after(project: SimpleNamespace, model: str, step: int) -> int | None:
    """The first checkpoint from that step on that the attempt which works now has committed."""
    token = attempts(project.store, state_of(project, model).prefix)[-1]
    committed = [e["step"] for e in events(project, model, token) if e["type"] == "checkpoint"]
    return next((found for found in committed if found >= step), None)


def newest_checkpoint(project: SimpleNamespace, model: str) -> int:
    """The step of the last one committed, also where its event was not told any more."""
    folder = f"{state_of(project, model).prefix}/checkpoints"
    manifests = [info.key for info in project.store.list(f"{folder}/") if info.key.endswith(MANIFEST)]
    return max(int(key.split("/")[-2].removeprefix("step_")) for key in manifests)


def test_a_training_that_is_killed_twice_ends_with_the_losses_of_one_that_was_not(
    project: SimpleNamespace, run: Callable[..., Run]
) -> None:
    resumed_from = []
    for until in (100, 300):
        training = run("killed")
        supervisor = supervisor_of(project, "killed")
        wait_for(lambda until=until: checkpoint_after(project, "killed", until), within_s=120)
        torchrun, *workers = supervisor.children(recursive=True)
        for process in [*workers, torchrun] if until == 300 else workers:
            process.kill()
        reason = training.end().reason
        assert re.match(
            r"base of killed ended with FAILED: a training process was killed \(SIGKILL\), by hand or by the "
            r"system, .* Run it again: it goes on from the last checkpoint$",
            reason,
        )
        assert not supervisor.is_running()
        resumed_from.append(newest_checkpoint(project, "killed"))
    last = run("killed")
    assert last.end(within_s=120).succeeded
    assert last.said(f"resuming from step {resumed_from[-1]} of 1000")
    interrupted: dict[int, tuple[float, float]] = {}
    for attempt in range(3):
        interrupted |= steps(told(project, "killed", attempt))
    story = [observed.metadata for observed in last.observations("base_model_checkpoint")]
    assert [(one["from_step"].value, one["ended"].value) for one in story] == [
        (0, "FAILED"),
        (resumed_from[0], "FAILED"),
    ]
    rows = last.materialization.metadata["attempts"].value.splitlines()
    assert [f"| {step} |" in row for step, row in zip([0, *resumed_from], rows[-3:], strict=True)] == [
        True
    ] * 3
    whole = run("killed", force=True)
    assert whole.end(within_s=120).succeeded
    assert not whole.said("resuming from")
    assert steps(told(project, "killed", -1)) == interrupted
    assert list(interrupted) == list(range(1, 1001))


def told(project: SimpleNamespace, model: str, attempt: int) -> list[dict[str, Any]]:
    """Everything that an attempt has said, counted from the first or (-1) the last."""
    return events(project, model, attempts(project.store, state_of(project, model).prefix)[attempt])


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


def test_a_run_that_finds_a_live_attempt_goes_on_where_the_dead_run_stopped(
    project: SimpleNamespace, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_nanochat import holding

    monkeypatch.setattr(holding, "HELD_TTL_S", 3.0)
    first = run("slow", in_process=True)
    supervisor = supervisor_of(project, "slow")
    prefix = state_of(project, "slow").prefix
    token = read_lease(project.store, f"{prefix}/lease.json").token
    wait_for(lambda: first.said("base step 1/"), within_s=90)
    _, read = EventStream(project.store, f"{prefix}/attempts/{token}/events.jsonl").read(Cursor())
    wait_for(lambda: read_summary(project.store, prefix, token).offset >= read.offset)
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


def test_what_ended_itself_because_nobody_watched_is_resumed(
    project: SimpleNamespace, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_nanochat import holding

    monkeypatch.setattr(holding, "HELD_TTL_S", 3.0)
    first = run("slow", in_process=True, watch_grace_s=6.0)
    supervisor = supervisor_of(project, "slow")
    family = [supervisor, *supervisor.children(recursive=True)]
    wait_for(lambda: steps(told(project, "slow", -1)))
    first.process.kill()
    assert psutil.wait_procs(family, timeout=40)[1] == []
    *_, committed, ending = (e for e in told(project, "slow", -1) if e["type"] in ("checkpoint", "failed"))
    assert (ending["failure"], committed["type"]) == ("CANCELLED", "checkpoint")
    assert "nobody has watched for" in ending["message"]
    second = run("slow")
    wait_for(lambda: second.said(f"resuming from step {committed['step']} of "))
    assert project.instance.get_run_by_id(first.id).status is dg.DagsterRunStatus.FAILURE


def test_a_stage_whose_supervisor_is_killed_is_lost(
    project: SimpleNamespace, run: Callable[..., Run]
) -> None:
    training = run("slow")
    supervisor = supervisor_of(project, "slow")
    family = supervisor.children(recursive=True)
    supervisor.kill()
    assert "ended with LOST: the supervisor of attempt" in training.end().reason
    assert psutil.wait_procs(family, timeout=10)[1] == []
