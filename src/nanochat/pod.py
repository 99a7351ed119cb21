"""What runs first on a rented machine: one attempt, once, and then the end of the machine.

    NANOCHAT_STORE=s3://… NANOCHAT_JOB=stages/base/…/job.json NANOCHAT_END='[…]' python -m nanochat.pod

A provider may start the container again when its first process ends, and bill on: so this process
never ends by itself. It runs the supervisor, whatever comes of that, and then sends the requests of
NANOCHAT_END, in turn and again and again, until the machine is gone. An attempt belongs to the machine
that claims it first: a second start of the container finds it claimed and trains nothing, and so does
a second machine, made by a request that was sent twice. Of several machines that make it together, the
first claims it for all. What cannot be told to the store is said on standard error.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import operator
import os
import string
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from nanochat.events import EventStream, ending_of
from nanochat.failures import Failure
from nanochat.follower import follow, wait_for_the_end
from nanochat.machine import driver_cuda, this_machine
from nanochat.nodes import GATHER_S, RANK_ENV, Ending, Node, NodeReport, OtherNodes, report_key
from nanochat.store import ObjectNotFound, ObjectStore, PreconditionFailed, StoreError, open_store
from nanochat.store.documents import Document, DocumentError
from nanochat.store.leases import LeaseHeld, machine_name, utc_now
from nanochat.supervisor import EventShipper, supervise
from nanochat.training.job import Rented, TrainingJob

STORE_ENV = "NANOCHAT_STORE"
JOB_ENV = "NANOCHAT_JOB"
END_ENV = "NANOCHAT_END"
# The name of the variable that has the name of this machine, or of the group of which it is one.
MACHINE_ENV = "NANOCHAT_MACHINE_VARIABLE"
# How long the machine may live at most: a supervisor that hangs ends with it.
LIFETIME_ENV = "NANOCHAT_LIFETIME_S"

# The network of a container that has just been started may come up after it.
_STORE_PATIENCE_S = 120.0
_RETRY_EVERY_S = 5.0
_GATHER_EVERY_S = 2.0
_END_TIMEOUT_S = 30.0
_END_EVERY_S = (2.0, 5.0, 10.0, 30.0, 60.0)


class EndRequest(BaseModel):
    """A request that ends the machine it is sent from, or asks what a later one has to know. ``${NAME}`` in
    url and body is what the environment has under that name; `bearer` is the name of the variable with the
    key. learns: names for later requests, and where their values are in the answer, as in ``cluster.id``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: Literal["DELETE", "GET", "POST"]
    url: str
    body: dict[str, str] | None = None
    bearer: str
    learns: dict[str, str] = Field(default_factory=dict)

    def send(self, environment: dict[str, str]) -> str:
        """What came of it, in a few words; what was learnt is in the environment then. Raises KeyError for
        a variable that is not set."""
        import httpx

        answer = httpx.request(
            self.method,
            string.Template(self.url).substitute(environment),
            json=None
            if self.body is None
            else {name: string.Template(value).substitute(environment) for name, value in self.body.items()},
            headers={
                "Authorization": f"Bearer {environment[self.bearer]}",
                # Some providers refuse requests that do not say who asks.
                "User-Agent": "dagster-nanochat",
            },
            timeout=_END_TIMEOUT_S,
        )
        if self.learns and answer.is_success:
            told = answer.json()
            for name, path in self.learns.items():
                environment[name] = str(functools.reduce(operator.getitem, path.split("."), told))
            return f"{self.method} {self.url}: {answer.status_code}"
        return f"{self.method} {self.url}: {answer.status_code} {answer.text:.200}"


def encode_end(requests: Sequence[EndRequest]) -> str:
    """The value of NANOCHAT_END."""
    return json.dumps([request.model_dump(exclude_none=True) for request in requests])


def end_machine(
    environment: Mapping[str, str], sleep: Callable[[float], Any] = time.sleep, rounds: int | None = None
) -> None:
    """Ask for the end until it comes, which ends this process too (`rounds`: or so often)."""
    requests = TypeAdapter(list[EndRequest]).validate_json(environment.get(END_ENV, "[]"))
    if not requests:
        _say(f"{END_ENV} does not say how to end this machine")
        return
    known = dict(environment)
    done = 0
    while rounds is None or done < rounds:
        for request in requests:
            try:
                _say(f"ending this machine: {request.send(known)}")
            except Exception as error:  # whatever fails, the next request is tried, and this one again
                _say(f"{request.method} {request.url} failed: {type(error).__name__}: {error}")
        sleep(_END_EVERY_S[min(done, len(_END_EVERY_S) - 1)])
        done += 1


class Claim(Document):
    """`attempts/<token>/machine.json`: which machine (or group of machines) makes the attempt.
    `attempts/<token>/twins/`: those that found it made already."""

    schema_name: ClassVar[str] = "nanochat.claim"
    machine: str
    at: datetime.datetime = Field(default_factory=utc_now)


def claimed_by(store: ObjectStore, attempt_prefix: str) -> str | None:
    """The machine that makes the attempt, once one does."""
    try:
        return Claim.read(store, f"{attempt_prefix}/machine.json").machine
    except ObjectNotFound:
        return None


def twins(store: ObjectStore, attempt_prefix: str) -> list[Claim]:
    """The machines that found the attempt made by another."""
    return [Claim.read(store, info.key) for info in store.list(f"{attempt_prefix}/twins/")]


def run_attempt(environment: Mapping[str, str]) -> None:
    """Run the attempt that the environment names, where no machine has begun it.

    Raises what reading the store and the job raises, after the attempt's events tell of it.
    """
    store = open_store(environment[STORE_ENV])
    attempt = environment[JOB_ENV].removesuffix("/job.json")
    try:
        _run_attempt(store, attempt, environment)
    except DocumentError as error:
        hint = "is this image made from another revision than the one that launches it?"
        if _speaks(environment):
            _end_attempt(
                store, attempt, Failure.BAD_REQUEST, f"the machine cannot read its job ({hint}): {error}"
            )
        raise
    except LeaseHeld as error:
        _end_attempt(store, attempt, Failure.LOST, str(error))
        raise


_STARTED_AGAIN = (
    "the container was started again: its first process had ended without a word, as it does when "
    "memory runs out or the host fails"
)


def _run_attempt(store: ObjectStore, attempt: str, environment: Mapping[str, str]) -> None:
    job = _read_patiently(store, environment[JOB_ENV])
    machine = environment.get(environment.get(MACHINE_ENV, ""), "") or machine_name()
    try:
        node = Node.of(environment, job.hardware.nodes)
    except ValueError as error:
        if _speaks(environment):
            _end_attempt(store, attempt, Failure.NOT_READY, str(error))
        return
    if node is not None and node.rank:
        _take_part(store, job, machine, node)
        return
    owner = _claim(store, attempt, machine)
    if owner == machine:
        _end_attempt(store, attempt, Failure.LOST, _STARTED_AGAIN)
        return
    if owner is not None:
        _say(f"attempt {job.token} belongs to machine {owner}: nothing to do here")
        # It may be gone before anybody sees it, and has cost money.
        store.put(f"{job.attempt_prefix}/twins/{machine}.json", Claim(machine=machine).to_bytes())
        return
    problem = broken_promise(job.rented) if job.rented else None
    if problem:
        _end_attempt(store, attempt, Failure.NOT_READY, problem)
        return
    ending = _gather(store, attempt, node) if node else None
    if ending:
        _end_attempt(store, attempt, ending.failure, ending.message)
        return
    supervise(store, job, node)


def _speaks(environment: Mapping[str, str]) -> bool:
    """Whether this is a machine that tells of the attempt: one alone, or the first of several."""
    return environment.get(RANK_ENV, "0") == "0"


def _gather(store: ObjectStore, attempt: str, node: Node) -> Ending | None:
    """Wait until the other nodes have come up; why that is no use, where it is none."""
    others = OtherNodes(store, attempt, node.count)
    deadline = time.monotonic() + GATHER_S
    while True:
        with _store_patience():
            others.look()
        if others.ending() or not others.missing:
            return others.ending()
        if time.monotonic() > deadline:
            missing = ", ".join(map(str, others.missing))
            return Ending(
                failure=Failure.NOT_READY, message=f"node {missing} has not come up within {GATHER_S:.0f} s"
            )
        time.sleep(_GATHER_EVERY_S)


def _take_part(store: ObjectStore, job: TrainingJob, group: str, node: Node) -> None:
    """As one of the nodes that are not the first, in the attempt that it has claimed for the group."""
    owner = _wait_for_claim(store, job.attempt_prefix)
    if owner != group:
        _say(f"attempt {job.token} belongs to {owner or 'nobody'}: nothing to do here")
        return
    key = report_key(job.attempt_prefix, node.rank)
    problem, failure = broken_promise(job.rented) if job.rented else None, Failure.NOT_READY
    try:
        store.put(key, NodeReport().to_bytes(), if_absent=True)
    except PreconditionFailed:
        problem, failure = _STARTED_AGAIN, Failure.LOST
    if problem:
        ending = Ending(failure=failure, message=problem)
        store.put(key, NodeReport(over=True, ending=ending).to_bytes())
    else:
        follow(store, job, node)
    wait_for_the_end(store, job)


def _wait_for_claim(store: ObjectStore, attempt: str) -> str | None:
    """Whose the attempt is; None where nobody has claimed it in all the time that it may take."""
    deadline = time.monotonic() + GATHER_S
    owner = None
    while owner is None and time.monotonic() < deadline:
        with _store_patience():
            owner = claimed_by(store, attempt)
        time.sleep(0 if owner else _GATHER_EVERY_S)
    return owner


@contextlib.contextmanager
def _store_patience() -> Iterator[None]:
    """For what is tried again in any case."""
    try:
        yield
    except StoreError as error:
        _say(f"the store cannot be read: {error}")


def _claim(store: ObjectStore, attempt: str, machine: str) -> str | None:
    """None if the attempt is this machine's now, else whose it was already."""
    key = f"{attempt}/machine.json"
    try:
        store.put(key, Claim(machine=machine).to_bytes(), if_absent=True)
    except PreconditionFailed:
        return Claim.read(store, key).machine
    return None


def broken_promise(rented: Rented) -> str | None:
    """What of the machine is less than was rented; None where nothing is."""
    gpus = this_machine().gpus
    if len(gpus) < rented.gpus:
        return f"{rented.offer} was to have {rented.gpus} GPUs; nvidia-smi shows {len(gpus)}"
    for number, gpu in enumerate(gpus):
        # What a data sheet calls 80 GB is 79.6 GiB to the driver: a tenth less is no surprise.
        if gpu.memory_bytes < 0.9 * rented.min_gpu_memory_gib * 2**30:
            return (
                f"GPU {number} ({gpu.name}) has {gpu.memory_bytes / 2**30:.1f} GiB of memory, "
                f"{rented.min_gpu_memory_gib:g} were to be had"
            )
    cuda = driver_cuda() if rented.min_cuda and gpus else None
    if cuda and _version(cuda) < _version(rented.min_cuda or "0"):
        return f"the driver supports CUDA {cuda}, the image needs {rented.min_cuda}"
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _read_patiently(store: ObjectStore, key: str) -> TrainingJob:
    deadline = time.monotonic() + _STORE_PATIENCE_S
    while True:
        try:
            return TrainingJob.read(store, key)
        except (StoreError, OSError) as error:
            if time.monotonic() > deadline:
                raise
            _say(f"the job cannot be read yet: {error}")
            time.sleep(_RETRY_EVERY_S)


def _end_attempt(store: ObjectStore, attempt: str, failure: Failure, message: str) -> None:
    """Say that the attempt is over, unless it has said so itself."""
    key = f"{attempt}/events.jsonl"
    if ending_of(EventStream(store, key).all()):
        return
    shipper = EventShipper(store, key, Path(os.devnull))
    shipper.emit("failed", failure=failure.value, message=message)
    shipper.ship()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    environment = dict(os.environ)
    lifetime_s = environment.get(LIFETIME_ENV)
    if lifetime_s:
        clock = threading.Timer(float(lifetime_s), end_machine, [environment])
        clock.daemon = True
        clock.start()
    try:
        run_attempt(environment)
    except BaseException as error:  # nothing may keep the machine from being given back
        _say(f"the attempt cannot be run: {type(error).__name__}: {error}")
    end_machine(environment)


if __name__ == "__main__":
    main()
