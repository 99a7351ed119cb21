"""Stages on RunPod: an emulator that runs the pods, a real S3 server, the real graph."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import psutil
import pytest
from emulators.hub.client import running_hub
from emulators.runpod import Emulator, find_spec
from standins import s3, webhook_receiver
from standins.runpod_account import IMAGE
from standins.runs import Run, state_of
from standins.waiting import wait_for

from nanochat.attempts import attempts
from nanochat.data.hub import HubRepo
from nanochat.data.shards import read_record
from nanochat.events import EventStream
from nanochat.store.layout import shard_record_key
from nanochat.store.ledger import entries
from nanochat.store.receipts import read_receipt

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"),
    pytest.mark.skipif(find_spec() is None, reason="RunPod's OpenAPI file is not there"),
]


def test_a_stage_is_trained_on_a_pod_that_is_gone_afterwards(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    built = run("tiny")
    assert built.end(within_s=120).succeeded, built.reason
    state = state_of(project, "tiny")
    receipt = read_receipt(project.store, "base", state.fingerprint)
    (pod,) = runpod.pods()
    (entry,) = entries(project.store)
    assert (entry.machine, entry.token, entry.outcome) == (pod.id, receipt.token, "finished")
    assert receipt.image_digest == IMAGE
    assert 0 < receipt.dollars <= entry.dollars()
    (launched,) = built.observations("base_model_checkpoint", of_this_run=True)
    assert launched.metadata["machine"].value.endswith(pod.id)
    assert launched.metadata["usd_per_h"].value == pytest.approx(pod.price_usd_per_h)


def endings(run: Run, model: str) -> list[dg.AssetObservation]:
    """What the stage's page tells of the model's attempts that ended without a receipt in this run's time."""
    told = run.observations("base_model_checkpoint", of_this_run=True)
    return [one for one in told if one.partition == model and "ended" in one.metadata]


GPU = "NVIDIA GeForce RTX 4090"


def told(run: Run, words: str) -> None:
    assert run.said(words), run.reason if not run.running and not run.succeeded else "it did not say that"


def test_no_capacity_goes_to_the_next_offer_and_a_refused_request_ends_the_stage(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    runpod.faults.add("no_capacity", gpu="4090", times=None)
    runpod.faults.add("status", match="POST /v2/pods$", status=422, detail="Request validation failed.")
    refused = run("tiny", force=True)
    assert not refused.end(within_s=120).succeeded
    assert "BAD_REQUEST" in refused.reason
    assert "Request validation failed (request " in refused.reason
    assert runpod.pods() == []
    built = run("tiny", force=True)
    assert built.end(within_s=120).succeeded, built.reason
    told(built, "1 x NVIDIA GeForce RTX 4090 (secure cloud) cannot be had: ")
    (pod,) = runpod.pods()
    assert pod.gpu != GPU


@pytest.mark.parametrize("fault", ["status_after", "hang_after"])
def test_a_pod_whose_creation_is_answered_with_an_error_is_found_and_used(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run], fault: str
) -> None:
    runpod.faults.add(fault, match="POST /v2/pods$", status=500, seconds=1.0)
    built = run("tiny", force=True)
    assert built.end(within_s=120).succeeded, built.reason
    assert len(runpod.pods()) == 1


def test_a_machine_that_does_not_come_up_and_one_that_is_lost_are_replaced(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    runpod.faults.add("pull_fails")
    training = run("killed")
    wait_for(lambda: training.said("Trying another machine (1 of 4 tried)"), within_s=60)
    told(training, "base of killed: NOT_READY: the machine does not come up: ")
    wait_for(lambda: training.said("base step 50: checkpoint"), within_s=120)
    *_, second = runpod.pods()
    runpod.faults.add("vanishes", pod=second.id)
    wait_for(lambda: training.said("(2 of 4 tried)"), within_s=60)
    assert training.end(within_s=120).succeeded, training.reason
    told(training, "resuming from step ")
    assert [pod.deleted_at is None for pod in runpod.pods()] == [False] * 3
    rows = training.materialization.metadata["attempts"].value
    assert rows.count("RTX 4090") == 3
    assert [one.metadata["ended"].value for one in endings(training, "killed")] == ["NOT_READY", "LOST"]


def test_terminate_gives_the_pod_back_within_half_a_minute_and_loses_no_step(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    training = run("steady")
    wait_for(lambda: training.said(": checkpoint committed"), within_s=120)
    training.cancel()
    assert training.end(within_s=30).status is dg.DagsterRunStatus.CANCELED
    (pod,) = runpod.pods()
    assert pod.deleted_at is not None
    (story,) = endings(training, "steady")
    assert story.metadata["ended"].value == "CANCELLED"
    assert story.metadata["checkpoint"].value == story.metadata["to_step"].value


def test_another_orchestrator_of_the_same_store_is_told_whose_the_stage_is_and_rents_nothing(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run], tmp_path: Path
) -> None:
    training = run("steady", in_process=True)
    wait_for(lambda: training.said(": checkpoint committed"), within_s=120)
    # It has a Dagster of its own: all that the two share is the store and the account.
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        how = {"asset": "base_model_checkpoint", "tags": {"dagster/partition": "steady"}, "config": {}}
        other = Run(instance, **how).end(within_s=60)
        assert not other.succeeded
        assert f"base of steady is being watched by run {training.id[:8]} of " in other.reason
        assert "wait for that run or terminate it" in other.reason
    assert training.running
    assert len(runpod.pods()) == 1
    training.cancel()
    assert training.end(within_s=30).status is dg.DagsterRunStatus.CANCELED


def test_an_attempt_that_reaches_its_cap_ends_with_a_checkpoint_that_the_next_run_resumes(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_nanochat.launch.runpod import offers

    monkeypatch.setattr(offers, "START_H", 0.0)  # at a dollar a second the start alone would be refused
    for gpu in runpod.catalog.gpus.values():
        gpu.secure = 3600.0
    training = run("steady", max_usd=40)
    assert not training.end(within_s=150).succeeded
    assert "base of steady ended with BUDGET: has cost the $40.00 that it may" in training.reason
    (pod,) = runpod.pods()
    assert 40 <= pod.charged_usd <= 70
    (story,) = endings(training, "steady")
    assert story.metadata["checkpoint"].value == story.metadata["to_step"].value
    monkeypatch.setenv("NANOCHAT_MAX_USD_PER_MODEL", "1")
    refused = run("steady", max_usd=1000)
    assert not refused.end().succeeded
    assert re.search(r"above the \$0\.00 that are left of the cap of \$1\.00 for steady", refused.reason)
    assert len(runpod.pods()) == 1
    monkeypatch.delenv("NANOCHAT_MAX_USD_PER_MODEL")
    more = run("steady", max_usd=1000)
    wait_for(lambda: more.said(f"resuming from step {story.metadata['checkpoint'].value} of "), within_s=90)
    more.cancel()
    assert more.end(within_s=30).status is dg.DagsterRunStatus.CANCELED


def test_a_container_that_is_started_again_trains_nothing_and_the_next_machine_resumes(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    training = run("steady")
    wait_for(lambda: training.said(": checkpoint committed"), within_s=120)
    (pod,) = runpod.pods()
    psutil.Process(pod.living_process_ids[0]).kill()
    wait_for(lambda: training.said("base of steady: LOST: the container was started again"), within_s=60)
    prefix = state_of(project, "steady").prefix
    token = wait_for(lambda: len(runpod.pods()) == 2 and attempts(project.store, prefix)[-1])
    stream = EventStream(project.store, f"{prefix}/attempts/{token}/events.jsonl")
    wait_for(lambda: any("resuming from step" in str(event) for event in stream.all()), within_s=90)
    assert [one.deleted_at is None for one in runpod.pods()] == [False, True]
    training.cancel()
    assert training.end(within_s=30).status is dg.DagsterRunStatus.CANCELED


def test_no_credential_is_written_down(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run], tmp_path_factory
) -> None:
    built = run("twin", force=True)
    assert built.end(within_s=120).succeeded, built.reason
    canaries = [os.environ["AWS_SECRET_ACCESS_KEY"], runpod.api_key]
    (pod,) = runpod.pods()
    assert pod.env["AWS_SECRET_ACCESS_KEY"] == "{{ RUNPOD_SECRET_AWS_SECRET_ACCESS_KEY }}"
    said = "\n".join(str(record) for record in project.instance.all_logs(built.id))
    said += json.dumps(runpod.requests, default=str)
    said += "\n".join(runpod.logs(pod.id))
    assert [canary for canary in canaries if canary in said] == []
    written = [path for folder in project.folders for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 50
    found = [path for path in written for canary in canaries if canary.encode() in path.read_bytes()]
    assert found == []


def test_what_a_dead_orchestrator_left_is_adopted(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    first = run("steady", in_process=True)
    wait_for(lambda: first.said("base: prepare"), within_s=90)
    first.process.kill()
    second = run("steady")
    wait_for(lambda: second.said("adopted the live attempt"), within_s=90)
    assert len(runpod.pods()) == 1
    second.cancel()
    assert second.end(within_s=30).status is dg.DagsterRunStatus.CANCELED


def test_a_pod_that_nobody_owns_is_listed_and_swept_and_a_strangers_is_left_alone(
    project: SimpleNamespace,
    runpod: Emulator,
    run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from dagster_nanochat.launch.runpod import sweeper
    from dagster_nanochat.launch.runpod.client import RunPodClient
    from dagster_nanochat.launch.runpod.models import GpuRequest, PodRequest
    from dagster_nanochat.pods import list_pods, remove_pod, sweep_pods

    for name in ("_SILENT_FOR", "_ASKING_FOR"):
        monkeypatch.setattr(sweeper, name, datetime.timedelta(seconds=1))
    with RunPodClient.from_environment() as client:
        names = ("their-pod", "nanochat-d4-base-20250101T000000-0badcafe")  # one of another store's ledger
        strangers = [
            client.create_pod(PodRequest(name=name, image=IMAGE, disk=10, gpu=GpuRequest(id=GPU))).id
            for name in names
        ]
        training = run("steady", in_process=True)
        wait_for(lambda: training.said("base: prepare"), within_s=120)
        assert sweep_pods() == 0
        assert "nothing to sweep" in capsys.readouterr().out
        training.process.kill()
        mine = next(pod for pod in runpod.pods() if pod.id not in strangers)
        runpod.faults.add("freezes", pod=mine.id)
        wait_for(
            lambda: list_pods() == 0 and f"nobody needs {mine.id}: " in capsys.readouterr().out, within_s=90
        )
        assert sweep_pods() == 0
        said = capsys.readouterr().out
        assert re.search(
            rf"^ended pod {mine.id} \(base of steady, .*\): nobody has its lease, and", said, re.M
        )
        assert remove_pod(strangers[0]) == 1
        living = [pod.id for pod in runpod.pods() if pod.deleted_at is None]
        assert living == strangers
        entry = next(entry for entry in entries(project.store) if entry.machine == mine.id)
        assert (entry.open, entry.outcome) == (False, "LOST")
        for stranger in strangers:
            client.delete_pod(stranger)


def test_a_pod_pulls_its_shards_from_the_hub_and_a_webhook_hears_what_it_cost(
    project: SimpleNamespace,
    runpod: Emulator,
    run: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [read_record(project.store, "tinytext", f"tinytext_part_{number}") for number in range(3)]
    stored = {record.key: project.store.get(record.key) for record in records}
    (tmp_path / "texts").mkdir()
    for record in records:
        (tmp_path / "texts" / f"{record.shard}.parquet").write_bytes(stored[record.key])
        project.store.delete(record.key)
    try:
        with running_hub(repos={"me/texts": tmp_path / "texts"}) as hub, webhook_receiver.serve() as receiver:
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            monkeypatch.setenv("NANOCHAT_WEBHOOK_URL", receiver.url)
            repo = HubRepo("me/texts")
            revision = repo.newest_revision()
            for record in records:
                url = repo.url(f"{record.shard}.parquet", revision)
                referenced = record.model_copy(update={"mode": "reference", "url": url})
                project.store.put(shard_record_key("tinytext", record.shard), referenced.to_bytes())
            built = run("tiny", force=True)
            assert built.end(within_s=120).succeeded, built.reason
            told(built, "2 shards come from the hub")
            pulled = [entry for entry in hub.requests() if entry["path"].startswith("/storage/")]
            assert len([entry for entry in pulled if entry["method"] == "GET"]) == 3
    finally:
        for record in records:
            project.store.put(record.key, stored[record.key])
            project.store.put(shard_record_key("tinytext", record.shard), record.to_bytes())
    (message,) = receiver.messages
    assert (message["model"], message["stage"], message["result"]) == ("tiny", "base", "succeeded")
    *_, entry = entries(project.store)
    assert message["dollars"] == pytest.approx(entry.dollars(), abs=1e-4)
    assert built.id in message["link"]
