"""Stages on a cluster of two nodes: an emulator that runs both, a real S3 server, torchrun over the two."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from emulators.runpod import Emulator, Image, PodTruth, find_spec, serve
from standins import hurried_stage, s3
from standins.runpod_account import IMAGE, bucket_project
from standins.runs import Run, state_of
from standins.waiting import wait_for

from dagster_nanochat import pods
from dagster_nanochat.launch.base import Handle, Request
from dagster_nanochat.launch.runpod import launcher, sweeper
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings
from dagster_nanochat.launch.runpod.launcher import PATIENCE, RunPodLauncher
from dagster_nanochat.launch.runpod.models import ClusterCompute, ClusterRequest
from nanochat import pod as in_pod
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import Hardware, named_recipes
from nanochat.store.leases import new_token
from nanochat.store.ledger import LedgerEntry, entries, read_entry
from nanochat.store.receipts import FileRef, read_receipt
from nanochat.training.job import JobHardware, TrainingJob

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec() is None, reason="RunPod's OpenAPI file is not there"),
]
needs_s3 = pytest.mark.skipif(
    s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"
)
CREATE = "POST /v2/clusters$"


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    """Two nodes are asked for."""
    module_environment.setenv("NANOCHAT_RUNPOD_NODES", "2")
    with bucket_project(tmp_path_factory, module_environment) as made:
        yield made


@pytest.fixture
def runpod(project: SimpleNamespace, runpod: Emulator) -> Iterator[Emulator]:
    """At the end every attempt is closed in the ledger, too, and the dollars are of all nodes."""
    before = {entry.token for entry in entries(project.store)}
    yield runpod
    ours = [entry for entry in entries(project.store) if entry.token not in before]
    assert [entry.token for entry in ours if entry.open] == []
    assert sum(entry.dollars() for entry in ours) >= sum(pod.charged_usd for pod in runpod.pods())


@needs_s3
def test_a_stage_is_trained_on_two_nodes_that_are_gone_afterwards(
    project: SimpleNamespace, runpod: Emulator, run: Callable[..., Run]
) -> None:
    built = run("tiny")
    assert built.end(within_s=600).succeeded, built.reason
    receipt = read_receipt(project.store, "base", state_of(project, "tiny").fingerprint)
    assert (receipt.hardware["nodes"], receipt.hardware["processes"]) == (2, 2)
    first, second = runpod.pods()
    assert first.cluster == second.cluster
    (entry,) = entries(project.store)
    assert (entry.machine, entry.nodes, entry.outcome) == (first.cluster, 2, "finished")
    assert 0 < receipt.dollars <= entry.dollars()
    assert entry.usd_per_h >= first.price_usd_per_h + second.price_usd_per_h
    assert first.env["NCCL_SOCKET_IFNAME"] == "ens1"


def told(run: Run, words: str, *, within_s: float = 5.0) -> None:
    wait_for(lambda: run.said(words) or not run.running, within_s=within_s)
    assert run.said(words), run.reason if not run.running and not run.succeeded else "it did not say that"


def vanishes(runpod: Emulator, node: PodTruth) -> str:
    runpod.faults.add("vanishes", pod=node.id)
    return "LOST: "


def dies(runpod: Emulator, node: PodTruth) -> str:
    runpod.faults.add("dies", pod=node.id, state="EXITED")
    return "LOST: "


def is_killed(runpod: Emulator, node: PodTruth) -> str:
    psutil.Process(node.living_process_ids[0]).kill()
    return "the container was started again"


more = pytest.mark.skipif("HISTORIES" not in os.environ, reason="told by `make histories`")


@needs_s3
@pytest.mark.parametrize(
    ("happens", "rank"),
    [(dies, 0), pytest.param(vanishes, 1, marks=more), pytest.param(is_killed, 1, marks=more)],
)
def test_a_node_that_is_lost_ends_the_attempt_and_the_next_goes_on_from_its_checkpoint(
    project: SimpleNamespace,
    runpod: Emulator,
    run: Callable[..., Run],
    happens: Callable[[Emulator, PodTruth], str],
    rank: int,
) -> None:
    training = run("lost", force=True)
    told(training, "base step 40: checkpoint", within_s=300)
    said = happens(runpod, runpod.pods()[rank])
    told(training, "(1 of 4 tried)", within_s=150)
    told(training, said)
    assert training.end(within_s=600).succeeded, training.reason
    told(training, "resuming from step ")
    nodes = runpod.pods()
    assert len({node.cluster for node in nodes}) == 2
    assert [node.deleted_at is None for node in nodes] == [False] * 4


# -- what becomes of the cluster, whatever its nodes do -----------------------------------------------


def test_what_a_cluster_cannot_be_asked_for_is_refused_before_runpod_is_asked(
    client_of: Callable[..., RunPodClient],
) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(500)

    refusing = RunPodLauncher(
        SimpleNamespace(url="s3://bucket"),  # type: ignore[arg-type]
        client_of(answer),
        RunPodSettings(nodes=2, min_ram_gib=64),
        image=IMAGE,
        patience=PATIENCE,
    )
    with pytest.raises(AttemptFailed, match="NANOCHAT_RUNPOD_MIN_RAM_GIB=64: RunPod cannot") as refused:
        refusing.offers(Request(gpus=8, min_gpu_memory_gib=80))
    assert refused.value.failure is Failure.BAD_REQUEST
    assert asked == []


class Account:
    """An account whose nodes do nothing, a launcher that asks for two, and a job for them."""

    def __init__(self, emulator: Emulator, folder: Path) -> None:
        self.emulator = emulator
        self.store = hurried_stage.Bucket(folder / "store")
        self.client = RunPodClient(emulator.api_key, base_url=emulator.url, create_timeout_s=1.0)
        self.launcher = RunPodLauncher(
            self.store,
            self.client,
            RunPodSettings(nodes=2),
            image=IMAGE,
            patience=PATIENCE,
            environment={},
        )
        self.offers = self.launcher.offers(Request(gpus=1, min_gpu_memory_gib=1))
        self.job = TrainingJob(
            stage="base",
            stage_version=1,
            fingerprint="f" * 64,
            token=new_token(),
            model="quick",
            recipe=named_recipes()["quick"],
            store_url=self.store.url,
            prefix="stages/base/ffffffffffff",
            tokenizer=FileRef(key="tokenizer.json", size_bytes=1, sha256="0" * 64),
            hardware=JobHardware(nodes=2),
            image=IMAGE,
        )

    def launch(self) -> Handle:
        return self.launcher.launch(self.job, self.offers[0])

    @property
    def entry(self) -> LedgerEntry:
        found = read_entry(self.store, self.job.token)
        assert found is not None
        return found

    @property
    def alive(self) -> list[PodTruth]:
        return [pod for pod in self.emulator.pods() if pod.deleted_at is None]


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name in ("_LOOK_EVERY_S", "_LIST_EVERY_S"):
        monkeypatch.setattr(launcher, name, 0.0)
    monkeypatch.setattr(launcher, "_LOOK_FOR_LOST_S", (0.1, 0.2, 0.4))
    images = {"*": Image(entrypoint=("sleep", "600"))}
    with serve(state_dir=tmp_path / "runpod", images=images) as emulator:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            emulator.set_secret(name, "secret")
        account = Account(emulator, tmp_path)
        yield account
        account.client.close()
        assert emulator.violations == []


def test_an_offer_counts_the_dollars_of_all_nodes(quiet: Account) -> None:
    handle, offer = quiet.launch(), quiet.offers[0]
    first, second = quiet.alive
    assert offer.name == f"2 x 1 x {first.gpu} (secure cloud)"
    assert offer.price_usd_per_h == pytest.approx(first.price_usd_per_h + second.price_usd_per_h)
    rented = quiet.launcher.rent(offer, 5.0)
    assert (rented.usd_per_h, rented.gpus) == (offer.price_usd_per_h, 1)
    assert quiet.launcher.hardware(Hardware(), offer).nodes == 2
    quiet.launcher.terminate(handle, "finished")
    assert quiet.alive == []
    assert quiet.entry.dollars() >= sum(pod.charged_usd for pod in quiet.emulator.pods()) > 0


@pytest.mark.parametrize("fault", ["status_after", "hang_after"])
def test_a_cluster_whose_creation_is_answered_with_an_error_is_adopted(quiet: Account, fault: str) -> None:
    quiet.emulator.faults.add(fault, match=CREATE, status=500, seconds=3.0)
    handle = quiet.launch()
    assert len(quiet.alive) == 2
    (machine,) = {pod.cluster for pod in quiet.alive}
    assert (handle.id, quiet.entry.machine, quiet.entry.in_doubt) == (machine, machine, True)
    found = quiet.launcher.find(quiet.job.prefix)
    assert found == handle
    quiet.launcher.terminate(handle)
    assert quiet.alive == []


def test_no_capacity_leaves_nothing_behind(quiet: Account) -> None:
    quiet.emulator.faults.add("no_capacity")
    with pytest.raises(AttemptFailed) as refused:
        quiet.launch()
    assert refused.value.failure is Failure.NO_CAPACITY
    assert quiet.emulator.pods() == []
    assert (quiet.entry.outcome, quiet.entry.dollars()) == ("NO_CAPACITY", 0.0)


@pytest.mark.parametrize(("kind", "fields"), [("vanishes", {}), ("dies", {"state": "ERROR"})])
def test_a_cluster_with_one_node_gone_is_dead_and_is_not_adopted(
    quiet: Account, kind: str, fields: dict[str, str]
) -> None:
    handle = quiet.launch()
    assert quiet.launcher.alive(handle)
    quiet.emulator.faults.add(kind, pod=quiet.alive[1].id, **fields)
    wait_for(lambda: not quiet.launcher.alive(handle), within_s=10)
    if kind == "dies":
        assert quiet.launcher.find(quiet.job.prefix) is None
    else:
        quiet.launcher.terminate(handle, "LOST")
    assert quiet.alive == []


def test_any_nodes_host_may_say_that_it_will_never_start(quiet: Account) -> None:
    quiet.emulator.faults.add("pull_fails", pod="-1$")
    handle = quiet.launch()
    trouble = wait_for(lambda: quiet.launcher.trouble(handle), within_s=20)
    assert "failed to pull image" in trouble
    quiet.launcher.terminate(handle, "NOT_READY")


def test_the_end_is_waited_for_until_no_node_is_left(quiet: Account) -> None:
    handle = quiet.launch()
    quiet.emulator.faults.add("lingers", pod=quiet.alive[1].id, seconds=2.0)
    quiet.launcher.terminate(handle, "finished")
    assert quiet.alive == []
    assert not quiet.entry.open


def test_a_cluster_that_nobody_owns_is_listed_swept_and_billed_and_a_strangers_is_left_alone(
    quiet: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("_SILENT_FOR", "_ASKING_FOR"):
        monkeypatch.setattr(sweeper, name, timedelta(seconds=0))
    compute = ClusterCompute(gpu_type_id="NVIDIA GeForce RTX 4090", gpu_count_per_pod=1, pod_count=2)
    # Somebody's, and one of another store's ledger.
    for name in ("theirs", "nanochat-d4-base-20250101T000000-0badcafe-g01234567"):
        quiet.client.create_cluster(ClusterRequest(name=name, image=IMAGE, disk=10, compute=compute))
    strangers = {pod.id for pod in quiet.alive}
    handle = quiet.launch()
    (rental,) = sweeper.rentals(quiet.client, quiet.store)
    assert (rental.machine.id, rental.machine.status) == (handle.id, "RUNNING")
    monkeypatch.setattr(pods, "open_store", lambda: quiet.store)
    monkeypatch.setenv("RUNPOD_API_KEY", quiet.emulator.api_key)
    monkeypatch.setenv("RUNPOD_API_URL", quiet.emulator.url)
    assert pods.list_pods() == 0
    assert f"nobody needs {handle.id}: nobody has its lease" in capsys.readouterr().out
    assert pods.sweep_pods() == 0
    assert capsys.readouterr().out.startswith(f"ended cluster {handle.id} (base of quick, 2 x 1 x ")
    assert {pod.id for pod in quiet.alive} == strangers
    bills = quiet.client.billing_clusters(quiet.entry.asked_at, cluster_id=handle.id)
    ours = [pod for pod in quiet.emulator.pods() if pod.id not in strangers]
    assert sum(bill.total_usd for bill in bills) == pytest.approx(sum(pod.charged_usd for pod in ours))
    assert quiet.entry.billed_usd == pytest.approx(sum(bill.total_usd for bill in bills))


def test_a_cluster_is_removed_by_its_id(
    quiet: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    handle = quiet.launch()
    monkeypatch.setattr(pods, "open_store", lambda: quiet.store)
    monkeypatch.setenv("RUNPOD_API_KEY", quiet.emulator.api_key)
    monkeypatch.setenv("RUNPOD_API_URL", quiet.emulator.url)
    assert pods.remove_pod(handle.id) == 0
    assert capsys.readouterr().out == f"cluster {handle.id} (base of quick) is gone\n"
    assert quiet.alive == []
    assert quiet.entry.outcome == "CANCELLED"


@pytest.mark.parametrize("allowed", [True, False])
def test_a_node_ends_its_cluster_where_its_key_may(quiet: Account, allowed: bool) -> None:
    quiet.emulator.settings.members_end_clusters = allowed
    handle = quiet.launch()
    first, second = quiet.alive
    environment = {
        "NANOCHAT_END": second.env["NANOCHAT_END"],
        "RUNPOD_POD_ID": second.id,
        "RUNPOD_API_KEY": quiet.emulator.pod_key(second.id),
    }
    in_pod.end_machine(environment, sleep=lambda _: None, rounds=1)
    if allowed:
        wait_for(lambda: not quiet.alive, within_s=10)
    else:
        assert {pod.id for pod in quiet.alive} == {first.id, second.id}
    quiet.launcher.terminate(handle)
    assert quiet.alive == []
