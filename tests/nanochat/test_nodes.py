"""Several machines of one attempt: who they are, and what they make of each other's words and silence."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nanochat import nodes
from nanochat.failures import Failure
from nanochat.nodes import Ending, FirstNode, Node, NodeReport, OtherNodes, first_cause, report_key
from nanochat.store import FileStore
from nanochat.store.leases import LeaseKeeper

ATTEMPT = "stages/base/ffffffffffff/attempts/t1"
LEASE = "stages/base/ffffffffffff/lease.json"
ENVIRONMENT = {"NODE_RANK": "1", "NUM_NODES": "2", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29400"}


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """wait(seconds): so much later it is, for whoever asks the clock from now on."""
    passed = [0.0]
    clock = SimpleNamespace(monotonic=lambda: passed[0], time=time.time)
    monkeypatch.setattr(nodes, "time", clock)
    return lambda seconds: passed.__setitem__(0, passed[0] + seconds)


def report(store: FileStore, rank: int, **fields: object) -> None:
    store.put(report_key(ATTEMPT, rank), NodeReport(host=f"host{rank}", **fields).to_bytes())


def test_a_node_knows_its_place_and_tells_torchrun() -> None:
    node = Node.of(ENVIRONMENT, 2)
    assert node is not None
    assert node.torchrun_options() == [
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=10.65.0.2",
        "--master-port=29400",
    ]
    assert Node.of(ENVIRONMENT, 1) is None


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"NODE_RANK": "0"}, "no NUM_NODES, MASTER_ADDR, MASTER_PORT"),
        ({**ENVIRONMENT, "NUM_NODES": "3"}, "one of 3 machines; 2 were asked for"),
    ],
)
def test_an_environment_of_another_cluster_is_refused(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Node.of(environment, 2)


@pytest.mark.parametrize(
    ("endings", "cause"),
    [
        ([("FAILED", "second", 2.0), ("FAILED", "first", 1.0)], "first"),
        ([("FAILED", "connection closed", 1.0), ("FAILED", "killed", None)], "killed"),
        ([("FAILED", "killed", None), ("LOST", "node 1 is silent", 9.0)], "node 1 is silent"),
    ],
)
def test_what_came_first_is_the_cause_and_a_machines_fault_before_all(
    endings: list[tuple[str, str, float | None]], cause: str
) -> None:
    found = first_cause(
        Ending(failure=Failure(failure), message=message, at=at) for failure, message, at in endings
    )
    assert found is not None
    assert found.message == cause


def test_the_first_node_waits_for_the_others_and_misses_those_that_fall_silent(
    tmp_store: FileStore, wait: Callable[[float], None]
) -> None:
    others = OtherNodes(tmp_store, ATTEMPT, 3)
    others.look()
    assert others.missing == [1, 2]
    wait(10 * nodes.SILENT_S)
    report(tmp_store, 1)
    report(tmp_store, 2)
    others.look()
    assert (others.missing, others.ending(), others.settled) == ([], None, False)
    wait(nodes.SILENT_S - 1)
    report(tmp_store, 2)
    others.look()
    wait(2)
    ending = others.ending()
    assert ending is not None
    assert (ending.failure, ending.message) == (Failure.LOST, "node 1 (host1) has not been heard of for 61 s")
    assert others.settled


def test_a_node_that_has_ended_is_not_missed_and_what_it_failed_with_is_told(tmp_store: FileStore) -> None:
    others = OtherNodes(tmp_store, ATTEMPT, 3)
    report(tmp_store, 1, over=True)
    report(tmp_store, 2)
    others.look()
    assert (others.ending(), others.settled) == (None, False)
    report(tmp_store, 2, over=True, ending=Ending(failure=Failure.FAILED, message="CUDA out of memory"))
    others.look()
    ending = others.ending()
    assert ending is not None
    assert ending.message == "node 2 (host2): CUDA out of memory"
    assert others.settled


def test_the_first_node_is_gone_when_its_lease_is_given_back_or_stands_still(
    tmp_store: FileStore, wait: Callable[[float], None]
) -> None:
    LeaseKeeper(tmp_store, LEASE, token="t1", owner="orchestrator", ttl_s=30).take()
    first = FirstNode(tmp_store, LEASE, "t1")
    wait(nodes.SILENT_S + 1)
    first.look()
    assert (first.begun, first.gone) == (False, None)
    lease = LeaseKeeper(tmp_store, LEASE, token="t1", owner="supervisor", ttl_s=30)
    lease.take()
    first.look()
    assert (first.begun, first.gone) == (True, None)
    wait(nodes.SILENT_S + 1)
    assert first.gone == "the first node has not been heard of for 61 s"
    lease.renew()
    first.look()
    assert first.gone is None
    lease.release()
    first.look()
    assert first.gone == "the first node has given the attempt up"


def test_a_first_node_that_never_begins_is_given_up(
    tmp_store: FileStore, wait: Callable[[float], None]
) -> None:
    first = FirstNode(tmp_store, LEASE, "t1")
    first.look()
    wait(nodes.GATHER_S)
    assert first.gone is None
    wait(1)
    assert first.gone == "the first node has not been heard of for 1201 s"
