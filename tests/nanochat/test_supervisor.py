"""The supervisor as a process, with torchrun under it and a stand-in for the training script."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from standins.waiting import wait_for

from nanochat.events import EventStream
from nanochat.recipes import named_recipes
from nanochat.store import FileStore
from nanochat.store.leases import LeaseKeeper, read_lease, utc_now
from nanochat.store.receipts import FileRef, read_receipt
from nanochat.supervisor import LEASE_TTL_S
from nanochat.training import process
from nanochat.training.job import TrainingJob

FINGERPRINT = "f" * 64
PREFIX = f"stages/base/{FINGERPRINT[:12]}"
# Runs the supervisor with another training script and other waiting times.
DRIVER = """
import json, sys
from nanochat import supervisor
settings = json.loads(sys.argv.pop(1))
supervisor.ENTRY_POINTS["base"] = settings.pop("script")
for name, value in settings.items():
    assert hasattr(supervisor, name)
    setattr(supervisor, name, value)
sys.exit(supervisor.main())
"""
# What every stand-in begins with; it says where it runs in its first event.
TRAINER = """
import json, os, pathlib, signal, sys, time
from nanochat.training.process import end_with_supervisor
assert sys.argv[-1] == "--supervised"
end_with_supervisor()
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
work, events = pathlib.Path(options["--work"]), open(options["--events"], "a")
def say(text):
    print(json.dumps({"type": "log", "message": str(text)}), file=events, flush=True)
say(f"pid {os.getpid()}")
"""
SLEEP = "time.sleep(300)"
FINISH = """
result = {"checkpoint": {"files": []}, "metrics": {"val_bpb": 1.5}, **RESULT}
(work / "result.json").write_text(json.dumps(result))
"""


class Attempt:
    """A supervisor that was started, and what can be seen of it."""

    def __init__(self, folder: Path, trainer: str, job: dict[str, Any], settings: dict[str, Any]) -> None:
        folder.mkdir()
        self.store = FileStore(folder / "store")
        script = folder / "trainer.py"
        script.write_text(TRAINER + trainer, encoding="utf-8")
        self.job = TrainingJob(
            **{
                "stage": "base",
                "stage_version": 1,
                "fingerprint": FINGERPRINT,
                "token": "t1",
                "model": "quick",
                "recipe": named_recipes()["quick"],
                "store_url": self.store.url,
                "prefix": PREFIX,
                "tokenizer": FileRef(key="tokenizer.json", size_bytes=1, sha256="0" * 64),
                "watch_grace_s": None,
                **job,
            }
        )
        key = f"{self.job.attempt_prefix}/job.json"
        self.store.put(key, self.job.to_bytes())
        self._errors = folder / "errors"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", DRIVER, json.dumps({"script": str(script), **settings})),
                    *("--store", self.store.url, "--job", key),
                ],
                stderr=errors,
                start_new_session=True,
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text(encoding="utf-8")

    @property
    def events(self) -> list[dict[str, Any]]:
        return EventStream(self.store, f"{self.job.attempt_prefix}/events.jsonl").all()

    def said(self, text: str) -> bool:
        return any(text in event.get("message", "") for event in self.events)

    def lease(self) -> Any:
        return read_lease(self.store, f"{PREFIX}/lease.json")

    def trainer(self) -> psutil.Process:
        """The training process, once it runs."""
        wait_for(lambda: self.said("pid "))
        message = next(e["message"] for e in self.events if e.get("message", "").startswith("pid "))
        return psutil.Process(int(message.removeprefix("pid ")))

    def end(self, *, within_s: float = 25.0) -> dict[str, Any]:
        """Its last event."""
        self.process.wait(timeout=within_s)
        return self.events[-1]


Start = Callable[..., Attempt]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(trainer's code, job={…}, **settings of the supervisor)."""
    started: list[Attempt] = []

    def run(trainer: str, job: dict[str, Any] | None = None, **settings: Any) -> Attempt:
        started.append(Attempt(tmp_path / f"attempt-{len(started)}", trainer, job or {}, settings))
        return started[-1]

    yield run
    for attempt in started:
        if attempt.process.poll() is None:
            attempt.process.terminate()
            attempt.process.wait(timeout=20)


def test_a_receipt_names_every_attempt_that_worked_on_the_stage(start: Start) -> None:
    attempts = [{"token": "t0", "seconds": 40.5}, {"token": "t1", "seconds": 1.0}]
    attempt = start(f"RESULT = {{'attempts': {attempts}}}{FINISH}")
    assert attempt.end()["type"] == "finished", attempt.errors
    receipt = read_receipt(attempt.store, "base", FINGERPRINT)
    assert receipt is not None
    assert [(cost.token, cost.outcome) for cost in receipt.attempts] == [
        ("t0", "interrupted"),
        ("t1", "succeeded"),
    ]
    assert receipt.attempts[0].seconds == 40.5
    assert receipt.attempts[1].seconds == receipt.seconds
    assert not attempt.lease().live(utc_now())


def test_a_result_that_names_no_attempts_is_this_attempts_alone(start: Start) -> None:
    attempt = start(f"RESULT = {{}}{FINISH}")
    assert attempt.end()["type"] == "finished", attempt.errors
    receipt = read_receipt(attempt.store, "base", FINGERPRINT)
    assert receipt is not None
    assert [cost.token for cost in receipt.attempts] == ["t1"]


def test_checkpoints_that_no_receipt_names_are_gone_once_the_receipt_is_written(start: Start) -> None:
    attempt = start(f"time.sleep(1.5)\nRESULT = {{}}{FINISH}")
    leftover = f"{PREFIX}/checkpoints/t0/step_00000010/manifest.json"
    attempt.store.put(leftover, b"{}")
    assert attempt.end()["type"] == "finished", attempt.errors
    assert attempt.store.head(leftover) is None


def test_no_training_outlives_a_killed_supervisor(start: Start) -> None:
    attempt = start(SLEEP)
    trainer = attempt.trainer()
    family = psutil.Process(attempt.process.pid).children(recursive=True)
    assert trainer in family
    os.kill(attempt.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_training_that_will_not_stop_ends_before_the_lease_of_its_killed_supervisor(start: Start) -> None:
    stubborn = "from nanochat.training import process\nprocess._ALONE_AT_MOST_S = 1.0\n"
    attempt = start(f"{stubborn}signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); {SLEEP}")
    trainer = attempt.trainer()
    wait_for(lambda: attempt.said("ready"))
    os.kill(attempt.process.pid, signal.SIGKILL)
    trainer.wait(timeout=5)
    assert process._ALONE_AT_MOST_S < LEASE_TTL_S


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans over")
def test_no_worker_outlives_a_killed_torchrun(start: Start) -> None:
    attempt = start(SLEEP)
    trainer = attempt.trainer()
    trainer.parent().kill()
    ending = attempt.end()
    assert (ending["type"], ending["failure"]) == ("failed", "FAILED")
    assert not trainer.is_running()


def break_store(attempt: Attempt) -> Callable[[], None]:
    """No event can be written any more, until what is returned is called."""
    attempts = attempt.store.root / PREFIX / "attempts"
    elsewhere = attempts.rename(attempts.with_name("elsewhere"))
    attempts.write_text("no folder any more")

    def mend() -> None:
        attempts.unlink()
        elsewhere.rename(attempts)

    return mend


def test_a_store_that_is_away_for_a_moment_ends_no_training(start: Start) -> None:
    attempt = start(f"for n in range(30): say(f'on {{n}}'), time.sleep(0.1)\nRESULT = {{}}{FINISH}")
    attempt.trainer()
    mend = break_store(attempt)
    time.sleep(1.5)
    mend()
    assert attempt.end()["type"] == "finished", attempt.errors
    said = [event["message"] for event in attempt.events if event.get("message", "").startswith("on ")]
    assert said == [f"on {n}" for n in range(30)]


def test_a_store_that_fails_ends_the_training_and_the_last_words_say_why(start: Start) -> None:
    attempt = start("while True: say('on'), time.sleep(0.1)", LEASE_TTL_S=3.0, _RENEW_EVERY_S=0.5)
    trainer = attempt.trainer()
    break_store(attempt)
    assert attempt.process.wait(timeout=25) == 1
    assert not trainer.is_running()
    assert "cannot report" in attempt.errors
    assert "FAILED: the supervisor cannot go on" in attempt.errors


LONG_GOODBYE = """
def stop(number, frame):
    say("stopping")
    time.sleep(5)
    say("kept a checkpoint")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
say("ready")
time.sleep(300)
"""


def test_while_training_stops_the_lease_is_renewed_and_events_are_shipped(start: Start) -> None:
    attempt = start(LONG_GOODBYE, LEASE_TTL_S=2.0, _RENEW_EVERY_S=0.5)
    wait_for(lambda: attempt.said("ready"))
    attempt.process.send_signal(signal.SIGTERM)
    wait_for(lambda: attempt.said("stopping"), within_s=4)
    while not attempt.said("kept a checkpoint"):
        assert attempt.lease().live(utc_now())
        time.sleep(0.1)
    ending = attempt.end()
    assert (ending["failure"], ending["message"]) == ("CANCELLED", "asked to stop by SIGTERM")


def test_a_training_that_does_not_stop_is_killed_when_its_time_is_up(start: Start) -> None:
    attempt = start(
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); {SLEEP}", _CHECKPOINT_GRACE_S=2
    )
    trainer = attempt.trainer()
    wait_for(lambda: attempt.said("ready"))
    attempt.process.send_signal(signal.SIGINT)
    assert attempt.end(within_s=12)["failure"] == "CANCELLED"
    assert not trainer.is_running()


def test_training_has_longer_to_stop_than_torchrun_gives_it_by_itself(start: Start) -> None:
    attempt = start(f"say(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']); RESULT = {{}}{FINISH}")
    attempt.end()
    assert attempt.said("60")


def test_who_lost_the_lease_writes_no_receipt(start: Start) -> None:
    steal = """
from nanochat.store import FileStore
from nanochat.store.leases import LeaseKeeper
store = FileStore(pathlib.Path(sys.argv[0]).parent / "store")
for token in ("t1", "thief"):
    keeper = LeaseKeeper(store, KEY, token=token, owner=token, ttl_s=60)
    keeper.take()
    keeper.release() if token == "t1" else None
"""
    trainer = f"KEY = {PREFIX + '/lease.json'!r}{steal}RESULT = {{}}{FINISH}"
    attempt = start(trainer, _RENEW_EVERY_S=1000.0)
    ending = attempt.end()
    assert (ending["type"], ending["failure"]) == ("failed", "LOST")
    assert read_receipt(attempt.store, "base", FINGERPRINT) is None
    assert attempt.lease().token == "thief"


def test_a_training_past_its_deadline_is_stopped(start: Start) -> None:
    attempt = start(SLEEP, job={"deadline_s": 6.0})
    trainer = attempt.trainer()
    ending = attempt.end()
    assert ending["failure"] == "DEADLINE"
    assert "of 6 s" in ending["message"]
    assert not trainer.is_running()


def test_silence_of_the_watch_is_counted_from_its_last_renewal_by_this_machines_clock(start: Start) -> None:
    attempt = start(SLEEP, job={"watch_grace_s": 6.0}, _RENEW_EVERY_S=0.2)

    def yesterday() -> datetime.datetime:
        return utc_now() - datetime.timedelta(days=1)

    # By the clock on the wall nobody has watched for a day, as after a night with the lid closed.
    watch = LeaseKeeper(
        attempt.store, f"{PREFIX}/watch.json", token="w", owner="w", ttl_s=30, clock=yesterday
    )
    watch.take()
    trainer = attempt.trainer()
    until = time.monotonic() + 7
    while time.monotonic() < until:
        watch.renew()
        time.sleep(0.2)
    assert trainer.is_running()
    silent_since = time.monotonic()
    ending = attempt.end()
    assert 4 < time.monotonic() - silent_since < 15
    assert ending["failure"] == "CANCELLED"
    assert "nobody has watched" in ending["message"]
