"""What runs first on a rented machine: once, whatever comes of it, and then the machine's end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from standins import nvidia_smi

from nanochat import pod
from nanochat.events import EventStream
from nanochat.failures import Failure
from nanochat.machine import this_machine
from nanochat.nodes import OtherNodes
from nanochat.recipes import named_recipes
from nanochat.store import FileStore
from nanochat.store.leases import LeaseKeeper, utc_now
from nanochat.store.receipts import FileRef
from nanochat.training.job import JobHardware, Rented, TrainingJob

PREFIX = "stages/base/ffffffffffff"
MACHINE = {"NANOCHAT_MACHINE_VARIABLE": "RUNPOD_POD_ID", "RUNPOD_POD_ID": "pod1"}


def _rented(**fields: Any) -> Rented:
    return Rented(
        **{
            "provider": "runpod",
            "offer": "2 x NVIDIA L40S",
            "usd_per_h": 2.0,
            "rented_at": utc_now(),
            "gpus": 2,
            "min_gpu_memory_gib": 44,
            "min_cuda": "13.0",
            **fields,
        }
    )


class Machine:
    """A store with an attempt's job in it, and the environment of a machine that is to make it."""

    def __init__(self, folder: Path) -> None:
        self.store = FileStore(folder / "store")
        self.job = TrainingJob(
            stage="base",
            stage_version=1,
            fingerprint="f" * 64,
            token="t1",
            model="quick",
            recipe=named_recipes()["quick"],
            store_url=self.store.url,
            prefix=PREFIX,
            tokenizer=FileRef(key="tokenizer.json", size_bytes=1, sha256="0" * 64),
            rented=_rented(gpus=0),
        )
        self.store.put(f"{self.job.attempt_prefix}/job.json", self.job.to_bytes())
        self.environment = {
            "NANOCHAT_STORE": self.store.url,
            "NANOCHAT_JOB": f"{self.job.attempt_prefix}/job.json",
            **MACHINE,
        }
        self.supervised: list[str] = []

    def run(self, **environment: str) -> None:
        pod.run_attempt({**self.environment, **environment})

    @property
    def told(self) -> list[dict[str, Any]]:
        return EventStream(self.store, f"{self.job.attempt_prefix}/events.jsonl").all()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(pod, "supervise", lambda store, job, node: made.supervised.append(job.token))
    return made


def test_a_machine_makes_an_attempt_once_and_says_so_when_its_container_is_started_again(
    machine: Machine,
) -> None:
    machine.run()
    assert machine.supervised == ["t1"]
    machine.run()
    assert machine.supervised == ["t1"]
    (failed,) = machine.told
    assert (failed["type"], failed["failure"]) == ("failed", "LOST")
    assert failed["message"].startswith("the container was started again")
    machine.run()
    assert len(machine.told) == 1


def test_a_twin_of_the_machine_leaves_the_attempt_alone(
    machine: Machine, capfd: pytest.CaptureFixture
) -> None:
    machine.run()
    machine.run(RUNPOD_POD_ID="pod2")
    assert machine.supervised == ["t1"]
    assert machine.told == []
    assert "attempt t1 belongs to machine pod1" in capfd.readouterr().err


def test_a_machine_that_is_not_what_was_rented_trains_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod, "broken_promise", lambda rented: f"{rented.offer} has no GPU")
    machine.run()
    assert machine.supervised == []
    (failed,) = machine.told
    assert (failed["failure"], failed["message"]) == ("NOT_READY", "2 x NVIDIA L40S has no GPU")


def test_a_job_that_the_image_cannot_read_is_told_to_whoever_waits(machine: Machine) -> None:
    document = {**machine.job.to_json(), "version": 99}
    machine.store.put(machine.environment["NANOCHAT_JOB"], json.dumps(document).encode())
    with pytest.raises(ValueError, match="schema version 99"):
        machine.run()
    (failed,) = machine.told
    assert failed["failure"] == "BAD_REQUEST"
    assert "is this image made from another revision" in failed["message"]


def test_a_lease_that_somebody_else_has_is_told_too(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supervise(store: FileStore, job: TrainingJob, node: None) -> None:
        LeaseKeeper(store, f"{PREFIX}/lease.json", token=job.token, owner="supervisor", ttl_s=30).take()

    monkeypatch.setattr(pod, "supervise", supervise)
    LeaseKeeper(machine.store, f"{PREFIX}/lease.json", token="other", owner="another", ttl_s=30).take()
    with pytest.raises(Exception, match="is held by another"):
        machine.run()
    assert machine.told[-1]["failure"] == "LOST"


CLUSTER = {"NANOCHAT_MACHINE_VARIABLE": "NANOCHAT_GROUP", "NANOCHAT_GROUP": "g1", "NUM_NODES": "2"}
FIRST = {**CLUSTER, "NODE_RANK": "0", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29400"}
SECOND = {**FIRST, "NODE_RANK": "1"}


@pytest.fixture
def cluster(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The same with an attempt that two nodes are to make; nobody is waited for for long."""
    machine.job = machine.job.model_copy(update={"hardware": JobHardware(nodes=2)})
    machine.store.put(machine.environment["NANOCHAT_JOB"], machine.job.to_bytes())
    monkeypatch.setattr(
        pod, "follow", lambda store, job, node: machine.supervised.append(f"node {node.rank}")
    )
    monkeypatch.setattr(pod, "wait_for_the_end", lambda store, job: machine.supervised.append("waited"))
    monkeypatch.setattr(pod, "GATHER_S", 0.2)
    monkeypatch.setattr(pod, "_GATHER_EVERY_S", 0.05)
    return machine


def test_the_first_node_begins_when_the_others_have_come_up_and_none_ends_before_it(cluster: Machine) -> None:
    other = threading.Thread(target=cluster.run, kwargs=SECOND)
    other.start()
    cluster.run(**FIRST)
    other.join()
    assert sorted(cluster.supervised) == ["node 1", "t1", "waited"]
    assert cluster.told == []


def test_an_attempt_whose_nodes_do_not_all_come_up_is_not_ready(cluster: Machine) -> None:
    cluster.run(**FIRST)
    assert cluster.supervised == []
    (failed,) = cluster.told
    assert (failed["failure"], failed["message"]) == ("NOT_READY", "node 1 has not come up within 0 s")


@pytest.mark.parametrize("broken", ["gpus", "started again"])
def test_what_is_wrong_with_a_node_is_told_by_the_first(
    cluster: Machine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    cluster.store.put(f"{cluster.job.attempt_prefix}/machine.json", pod.Claim(machine="g1").to_bytes())
    if broken == "gpus":
        monkeypatch.setattr(pod, "broken_promise", lambda rented: "one GPU is missing")
    else:
        cluster.run(**SECOND)
    cluster.run(**SECOND)
    assert cluster.told == []
    others = OtherNodes(cluster.store, cluster.job.attempt_prefix, 2)
    others.look()
    ending = others.ending()
    assert ending is not None
    assert ending.failure is (Failure.NOT_READY if broken == "gpus" else Failure.LOST)
    assert ("one GPU is missing" if broken == "gpus" else "the container was started again") in ending.message


def test_the_nodes_of_a_twin_cluster_take_no_part(cluster: Machine, capfd: pytest.CaptureFixture) -> None:
    cluster.store.put(f"{cluster.job.attempt_prefix}/machine.json", pod.Claim(machine="g1").to_bytes())
    for node in (FIRST, SECOND):
        cluster.run(**{**node, "NANOCHAT_GROUP": "g2"})
    assert cluster.supervised == []
    assert cluster.told == []
    assert [twin.machine for twin in pod.twins(cluster.store, cluster.job.attempt_prefix)] == ["g2"]
    assert capfd.readouterr().err.count("belongs to") == 2


def test_a_cluster_of_another_size_is_not_ready_and_one_node_says_so(cluster: Machine) -> None:
    for node in (SECOND, FIRST):
        cluster.run(**{**node, "NUM_NODES": "3"})
    (failed,) = cluster.told
    assert (failed["failure"], failed["message"]) == ("NOT_READY", "one of 3 machines; 2 were asked for")


@pytest.mark.parametrize(
    ("gpus", "promise", "problem"),
    [
        ({"count": 2}, {}, None),
        ({"count": 1}, {}, "was to have 2 GPUs; nvidia-smi shows 1"),
        ({"count": 2, "memory_gib": 23}, {}, "GPU 0 (NVIDIA L40S) has 23.0 GiB of memory, 44 were to be had"),
        ({"count": 2, "memory_gib": 40}, {}, None),
        ({"count": 2, "cuda": "12.9"}, {}, "the driver supports CUDA 12.9, the image needs 13.0"),
        ({"count": 2, "cuda": "12.9"}, {"min_cuda": "12.10"}, "the driver supports CUDA 12.9"),
        ({"count": 2, "cuda": "12.9"}, {"min_cuda": None}, None),
    ],
)
def test_what_was_promised_is_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: dict[str, Any],
    promise: dict[str, Any],
    problem: str | None,
) -> None:
    monkeypatch.setenv("PATH", str(nvidia_smi.write(tmp_path / "bin", **gpus)), prepend=":")
    this_machine.cache_clear()
    try:
        found = pod.broken_promise(_rented(**promise))
    finally:
        this_machine.cache_clear()
    assert (found is None) == (problem is None)
    assert (problem or "") in (found or "")


@pytest.fixture
def provider() -> Iterator[Callable[..., Any]]:
    """A provider's API: what it was asked, and with which key."""
    asked: list[tuple[str, str, str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked.append((self.command, self.path, self.headers["Authorization"], body))
            told = b'{"id": "p1", "cluster": {"id": "c1"}}' if self.command == "GET" else b""
            self.send_response({"DELETE": 500, "GET": 200}.get(self.command, 204))
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_DELETE = do_GET = do_POST = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield lambda: (f"http://127.0.0.1:{server.server_port}", asked)
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_end_is_asked_for_by_every_route_again_and_again(
    provider: Callable[..., Any], capfd: pytest.CaptureFixture
) -> None:
    url, asked = provider()
    end = [
        pod.EndRequest(method="DELETE", url=f"{url}/pods/${{RUNPOD_POD_ID}}", bearer="RUNPOD_API_KEY"),
        pod.EndRequest(
            method="POST",
            url=f"{url}/pods/${{RUNPOD_POD_ID}}/action",
            body={"action": "terminate"},
            bearer="RUNPOD_API_KEY",
        ),
        pod.EndRequest(method="DELETE", url="http://127.0.0.1:9/gone", bearer="NOT_SET"),
    ]
    environment = {"NANOCHAT_END": pod.encode_end(end), "RUNPOD_API_KEY": "canary", "RUNPOD_POD_ID": "p1"}
    pauses: list[float] = []
    pod.end_machine(environment, sleep=pauses.append, rounds=2)
    once = [
        ("DELETE", "/pods/p1", "Bearer canary", ""),
        ("POST", "/pods/p1/action", "Bearer canary", '{"action":"terminate"}'),
    ]
    assert asked == once * 2
    assert pauses == [2.0, 5.0]
    said = capfd.readouterr().err
    assert "500" in said
    assert "KeyError: 'NOT_SET'" in said
    assert "canary" not in said


def test_a_member_of_a_cluster_asks_which_it_is_of_before_it_ends_it(
    provider: Callable[..., Any], capfd: pytest.CaptureFixture
) -> None:
    url, asked = provider()
    end = [
        pod.EndRequest(method="GET", url=f"{url}/pods/p1", bearer="KEY", learns={"ITS_ID": "cluster.id"}),
        pod.EndRequest(method="DELETE", url=f"{url}/clusters/${{ITS_ID}}", bearer="KEY"),
    ]
    pod.end_machine({"NANOCHAT_END": pod.encode_end(end), "KEY": "canary"}, sleep=lambda _: None, rounds=1)
    assert [(method, path) for method, path, _, _ in asked] == [
        ("GET", "/pods/p1"),
        ("DELETE", "/clusters/c1"),
    ]


def test_a_machine_that_was_not_told_how_to_end_says_so(capfd: pytest.CaptureFixture) -> None:
    pod.end_machine({})
    assert "NANOCHAT_END does not say how to end this machine" in capfd.readouterr().err
