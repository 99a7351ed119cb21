"""Training on shards that this machine pulls from the hub, against the hub's emulator and its own client."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from emulators.hub.client import HubEmulator, running_hub

from nanochat.data.hub import HubRepo, Patience
from nanochat.training import arrivals
from nanochat.training.checkpoint_folders import list_checkpoints
from nanochat.training.job import TrainingJob
from nanochat.training.trainer import Trainer, TrainingStopped

if TYPE_CHECKING:
    from conftest import Workshop

REPO = "someone/words"


@pytest.fixture
def hub(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubEmulator]:
    """Has the workshop's shards, which its store loses."""
    folder = workshop.folder / "hub"
    folder.mkdir()
    for name in ("shard_0", "shard_1", "validation_shard"):
        file = workshop.files[name]
        (folder / file.name).write_bytes(workshop.store.get(file.key))
    monkeypatch.setattr(arrivals, "_PATIENCE", Patience(attempts=2, first_pause_s=0.01))
    with running_hub(repos={REPO: folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def referenced(workshop: Workshop, hub: HubEmulator, **how: Any) -> TrainingJob:
    """A job whose shards the store does not hold."""
    job = workshop.job("base", **how)
    repo = HubRepo(REPO)
    revision = repo.newest_revision()
    assert job.validation is not None
    files = [*job.shards, job.validation]
    for file in files:
        workshop.store.delete(file.key)
    return job.model_copy(update={"urls": {file.key: repo.url(file.name, revision) for file in files}})


def storage_of(workshop: Workshop, name: str) -> str:
    return f"GET /storage/{workshop.files[name].sha256}"


def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_AT_ONCE", 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_shards_of_the_hub_give_the_losses_of_copies(
    workshop: Workshop, make_hub_job: Callable[..., TrainingJob], processes: int
) -> None:
    copied = workshop.run(workshop.job("base", prefix="stages/copied/x"))
    job = make_hub_job()
    pulled = workshop.run(job) if processes == 1 else workshop.run_processes(job, processes)
    assert list(pulled.losses) == list(copied.losses)
    assert list(pulled.losses.values()) == pytest.approx(
        list(copied.losses.values()), rel=0 if processes == 1 else 1e-5
    )
    assert any("2 shards come from the hub" in line for line in pulled.logs("info"))


@pytest.fixture
def make_hub_job(workshop: Workshop, request: pytest.FixtureRequest) -> Callable[..., TrainingJob]:
    """A job on the hub's shards; the hub is started when it is asked for, as the store loses them then."""

    def make(**how: Any) -> TrainingJob:
        return referenced(workshop, request.getfixturevalue("hub"), **how)

    return make


def test_training_begins_before_the_last_shard_is_there(
    workshop: Workshop, hub: HubEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time(monkeypatch)
    hub.fault(storage_of(workshop, "shard_1"), "slow", pause_s=3.0)
    arrived: list[float] = []
    bring = arrivals.Arrival.bring

    def noting(self: arrivals.Arrival, stop: Any) -> None:
        bring(self, stop)
        arrived.append(time.time())

    monkeypatch.setattr(arrivals.Arrival, "bring", noting)
    recipe = workshop.recipe
    outcome = workshop.run(referenced(workshop, hub, recipe=recipe))
    first_step = next(event["time"] for event in outcome.events if event["type"] == "step")
    assert len(arrived) == 3
    assert first_step < arrived[-1]


def test_a_request_to_stop_ends_the_wait_for_a_shard_and_loses_no_step(
    workshop: Workshop, hub: HubEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_at_a_time(monkeypatch)
    hub.fault(storage_of(workshop, "shard_1"), "slow", pause_s=60.0)
    report = Trainer._report

    def waiting_soon(self: Trainer, **fields: Any) -> None:
        report(self, **fields)
        if self.progress.step == 1:
            threading.Timer(2.0, os.kill, [os.getpid(), signal.SIGTERM]).start()

    monkeypatch.setattr(Trainer, "_report", waiting_soon)
    job = referenced(workshop, hub)
    work = workshop.work()
    began = time.monotonic()
    with pytest.raises(TrainingStopped, match="a checkpoint of step"):
        workshop.train(job, work)
    assert time.monotonic() - began < 30
    stopped = workshop.outcome(job, work)
    *_, kept = list_checkpoints(workshop.store, f"{job.prefix}/checkpoints")
    assert int(kept[-8:]) == max(stopped.losses) < workshop.recipe.base.steps


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "wrong_bytes", "after": 50}, "arrived damaged twice: expected sha256 "),
        ({"kind": "status", "status": 503}, "failed 2 times"),
    ],
)
def test_a_download_that_fails_ends_the_training_by_name(
    workshop: Workshop, hub: HubEmulator, fault: dict[str, Any], message: str
) -> None:
    job = referenced(workshop, hub)
    hub.fault(storage_of(workshop, "shard_1"), times=5, **fault)
    work: Path = workshop.work()
    with pytest.raises(Exception, match="shard_1"):
        workshop.train(job, work)
    error = json.loads((work / "error.json").read_text())
    assert error["failure"] == "BAD_REQUEST"
    assert message in error["message"]
    assert "shard_1.parquet" in error["message"]


def test_a_resumed_training_fetches_first_what_it_reads_first(
    workshop: Workshop, hub: HubEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = referenced(workshop, hub)
    one_at_a_time(monkeypatch)
    coming = [
        arrivals.Arrival(file=file, url=job.urls[file.key], place=workshop.folder / str(number))
        for number, file in enumerate(job.shards * 2)
    ]
    order = arrivals.Arrivals(coming)
    order.go_on_at(workshop.folder / "2")
    order.fetch()
    order.wait_for(workshop.folder / "1")
    assert sorted(range(4), key=lambda number: (workshop.folder / str(number)).stat().st_mtime_ns) == [
        2,
        3,
        0,
        1,
    ]
