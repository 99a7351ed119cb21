"""The worst histories with nothing stood in for: Dagster runs the stage, pods train on an S3 server."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulators.runpod import Emulator, find_spec
from standins import s3, s3_faults
from standins.runpod_account import IMAGE, account
from standins.runs import Run, ready_project, state_of
from standins.waiting import wait_for

from dagster_nanochat.launch.runpod import sweeper
from dagster_nanochat.pods import sweep_pods
from nanochat.attempts import attempts, read_events
from nanochat.store.ledger import entries
from nanochat.store.receipts import read_receipt

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif("HISTORIES" not in os.environ, reason="told by `make histories`"),
    pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"),
    pytest.mark.skipif(find_spec() is None, reason="RunPod's OpenAPI file is not there"),
]
CREATE = "POST /v2/pods$"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_faults.S3FaultProxy]:
    folder = tmp_path_factory.mktemp("s3").resolve()
    with s3.serve(folder / "buckets") as server, s3_faults.proxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment, network) -> Iterator[SimpleNamespace]:
    """A bucket with the tiny models' shards and tokenizer, and a Dagster history."""
    root, home = tmp_path_factory.mktemp("project").resolve(), tmp_path_factory.mktemp("dagster")
    module_environment.setattr("dagster_nanochat.views.project_root", lambda: root)
    environment = {
        "NANOCHAT_CACHE": str(root / "cache"),
        "NANOCHAT_RUNPOD_IMAGE_NAME": IMAGE,
        "AWS_ENDPOINT_URL": network.url,
        "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in environment.items():
        module_environment.setenv(name, value)
    with ready_project(f"s3://{s3.BUCKET}/models", home, module_environment) as made:
        yield made


@pytest.fixture
def runpod(
    project: SimpleNamespace,
    network: s3_faults.S3FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Emulator]:
    """An account whose pods reach the store each in its own way."""
    with account(tmp_path, monkeypatch, silent_s=12.0, network=network) as emulator:
        yield emulator


def strike(runpod: Emulator, kind: str, **fields: object) -> None:
    """Something happens to the pod that trains."""
    *_, pod = runpod.pods()
    runpod.faults.add(kind, pod=pod.id, **fields)


def a_pod_freezes_and_will_not_be_deleted_at_first(runpod: Emulator) -> None:
    runpod.faults.add("status", match="DELETE", status=500, times=3)
    runpod.faults.add("lingers", seconds=2.0)
    strike(runpod, "freezes")


def a_pod_loses_its_network(runpod: Emulator) -> None:
    strike(runpod, "network")


def a_pod_vanishes_while_the_api_is_away(runpod: Emulator) -> None:
    runpod.faults.add("status", status=503, times=3, key="account")
    strike(runpod, "vanishes")


def a_pod_dies_and_the_next_is_made_without_an_answer(runpod: Emulator) -> None:
    runpod.faults.add("status_after", match=CREATE, status=500)
    strike(runpod, "dies", state="ERROR")


@pytest.mark.parametrize(
    "happens",
    [
        a_pod_freezes_and_will_not_be_deleted_at_first,
        a_pod_loses_its_network,
        a_pod_vanishes_while_the_api_is_away,
        a_pod_dies_and_the_next_is_made_without_an_answer,
    ],
)
def test_a_training_that_loses_its_pod_ends_on_another(
    project: SimpleNamespace,
    runpod: Emulator,
    run: Callable[..., Run],
    happens: Callable[[Emulator], None],
) -> None:
    before = spent(project)
    training = run("lost", force=True)
    wait_for(lambda: training.said("base step 40: checkpoint"), within_s=120)
    happens(runpod)
    assert training.end(within_s=200).succeeded, training.reason
    assert training.said("resuming from step ")
    promises_hold(project, runpod, before)


def test_a_pod_that_nobody_was_told_of_is_adopted_after_a_kill(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    before = spent(project)
    runpod.faults.add("hang_after", match=CREATE, seconds=120.0)
    first = run("lost", in_process=True, force=True)
    wait_for(runpod.pods, within_s=90)
    first.process.kill()
    second = run("lost", force=True)
    assert second.end(within_s=200).succeeded, second.reason
    assert second.said("adopted the live attempt")
    assert len(runpod.pods()) == 1
    promises_hold(project, runpod, before)


def asks_for_a_pod(project: SimpleNamespace, runpod: Emulator) -> bool:
    return any(one["path"].startswith("/v2/account/secrets") for one in runpod.requests)


def waits_for_a_pod(project: SimpleNamespace, runpod: Emulator) -> bool:
    return bool(runpod.pods())


def trains(project: SimpleNamespace, runpod: Emulator) -> bool:
    return told_of(project, "step", 50)


def has_committed(project: SimpleNamespace, runpod: Emulator) -> bool:
    return told_of(project, "checkpoint", 80)


def has_a_receipt(project: SimpleNamespace, runpod: Emulator) -> bool:
    newest = attempts(project.store, state_of(project, "lost").prefix)[-1:]
    receipt = read_receipt(project.store, "base", state_of(project, "lost").fingerprint)
    return bool(runpod.pods()) and receipt is not None and [receipt.token] == newest


def ends_the_pod(project: SimpleNamespace, runpod: Emulator) -> bool:
    return any(one["method"] == "DELETE" for one in runpod.requests)


def told_of(project: SimpleNamespace, kind: str, step: int) -> bool:
    """Whether the newest attempt has told of that step."""
    prefix = state_of(project, "lost").prefix
    newest = attempts(project.store, prefix)[-1:]
    told = [event for token in newest for event in read_events(project.store, prefix, token)]
    return any(event["type"] == kind and event["step"] >= step for event in told)


@pytest.mark.parametrize(
    "state",
    [asks_for_a_pod, waits_for_a_pod, trains, has_committed, has_a_receipt, ends_the_pod],
)
def test_an_orchestrator_that_is_killed_in_any_state_is_followed_by_one_that_goes_on(
    project: SimpleNamespace,
    runpod: Emulator,
    run: Callable[..., Run],
    state: Callable[[SimpleNamespace, Emulator], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweeper, "_ASKING_FOR", datetime.timedelta(seconds=1))
    before = spent(project)
    project.store.delete(f"{state_of(project, 'lost').prefix}/receipt.json")
    runpod.faults.add("lingers", seconds=2.0)
    first = run("lost", in_process=True)
    wait_for(lambda: state(project, runpod), within_s=120)
    first.process.kill()
    second = run("lost")
    assert second.end(within_s=200).succeeded, second.reason
    wait_for(lambda: all(pod.deleted_at for pod in runpod.pods()), within_s=30)
    assert len(runpod.pods()) == 1
    assert sweep_pods() == 0  # where the stage was found fresh, the ledger still has to hear of its pod
    promises_hold(project, runpod, before)


def spent(project: SimpleNamespace) -> set[str]:
    return {entry.token for entry in entries(project.store)}


def promises_hold(project: SimpleNamespace, runpod: Emulator, before: set[str]) -> None:
    """No pod, no twin at work, no unknown dollar, and a receipt."""
    assert runpod.violations == []
    assert [pod.id for pod in runpod.pods() if pod.deleted_at is None] == []
    ours = [entry for entry in entries(project.store) if entry.token not in before]
    assert [entry.token for entry in ours if entry.open] == []
    assert sum(entry.dollars() for entry in ours) >= sum(pod.charged_usd for pod in runpod.pods()) > 0
    state = state_of(project, "lost")
    receipt = read_receipt(project.store, "base", state.fingerprint)
    assert [entry.model for entry in ours if entry.token == receipt.token] == ["lost"]
    spans = []
    for token in attempts(project.store, state.prefix):
        events = read_events(project.store, state.prefix, token)
        steps = [event["time"] for event in events if event["type"] == "step"]
        if steps:
            spans.append((min(steps), max(steps)))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(spans)))
