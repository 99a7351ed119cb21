"""What runs first on any machine: one attempt of one training stage, from job to receipt.

    python -m nanochat.supervisor --store file:///… --job stages/base/…/attempts/…/job.json

It holds the attempt's lease while it lives, runs torchrun, ships events to the store, enforces the
deadline, ends when nobody has watched for too long, verifies what training left behind, and writes
the receipt. A signal (SIGTERM, SIGINT) asks for the same orderly end as the deadline. Whatever ends
the supervisor ends its training too: nothing trains without a lease. It knows no provider: a launcher
that rents machines adds how to end one. Of several machines this runs on the first, `follower` on the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanochat.attempts import CancelRequest, cancel_requested
from nanochat.events import encode_event
from nanochat.failures import Failure
from nanochat.machine import gpu_usage
from nanochat.nodes import SILENT_S, Ending, Node, OtherNodes, first_cause
from nanochat.store import ObjectStore, open_store, project_root
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import LeaseKeeper, LeaseLost, read_lease, utc_now
from nanochat.store.objects import StoreError
from nanochat.store.receipts import AttemptCost, FileRef, Receipt, write_receipt
from nanochat.training.checkpoint_folders import drop_leftovers
from nanochat.training.job import TrainingJob

if TYPE_CHECKING:
    import psutil

LEASE_TTL_S = 30.0
_RENEW_EVERY_S = 5.0
_POLL_S = 0.25
_SHIP_TO_BUCKETS_EVERY_S = 2.0
# A training that is asked to stop ends its step and keeps a checkpoint. torchrun gives its workers
# this long, and what it has to tidy up itself comes on top.
_CHECKPOINT_GRACE_S = 60
STOP_GRACE_S = _CHECKPOINT_GRACE_S + 15.0
# torchrun's account of a worker that could not say anything itself.
_WORKER_KILLED = re.compile(r"exitcode +: -\d+ \(pid: \d+\) *\n?.*?\b(SIG[A-Z]+)")
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

ENTRY_POINTS = {
    "base": "train_base_remote.py",
    "midtrain": "train_midtraining_remote.py",
    "sft": "train_sft_remote.py",
}


class EventShipper:
    """Appends lines to the attempt's stream in the store: the supervisor's own and, from a spool
    file, the trainer's. One writer, whole lines only."""

    def __init__(self, store: ObjectStore, key: str, spool: Path) -> None:
        self._store = store
        self._key = key
        self._spool = spool
        self._offset = 0
        self._pending: list[bytes] = []
        self._lock = threading.Lock()

    def emit(self, type: str, **fields: Any) -> None:
        with self._lock:
            self._pending.append(encode_event(type, **fields))

    def ship(self) -> None:
        """Raises StoreError; what was not shipped then is shipped the next time."""
        with self._lock:
            lines = list(self._pending)
        whole = b""
        if self._spool.exists():
            with self._spool.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
        joined = b"".join([*lines, whole])
        if joined:
            self._store.append(self._key, joined)
        self._offset += len(whole)
        with self._lock:
            del self._pending[: len(lines)]


class Supervisor:
    """One attempt. `run()` returns the exit code: 0 with a receipt, 1 without."""

    def __init__(self, store: ObjectStore, job: TrainingJob, work: Path, node: Node | None = None) -> None:
        """node: which of the attempt's machines this is, where there are several."""
        self._store = store
        self._job = job
        self._work = work
        self._node = node
        self._spool = work / "events.jsonl"
        self._attempt = attempt_prefix(job.prefix, job.token)
        self._shipper = EventShipper(store, f"{self._attempt}/events.jsonl", self._spool)
        self._lease = LeaseKeeper(
            store, f"{job.prefix}/lease.json", token=job.token, owner="supervisor", ttl_s=LEASE_TTL_S
        )
        # In a bucket every shipment is an object, to be paid for and to be listed.
        self._ship_every_s = 0.0 if store.local_path("x") else _SHIP_TO_BUCKETS_EVERY_S
        self._ship_at = time.monotonic()
        self._renew_at = time.monotonic() + _RENEW_EVERY_S
        self._watch_expires_at: datetime.datetime | None = None
        self._watch_seen_at = time.monotonic()
        self._signalled: str | None = None
        self._cancel: CancelRequest | None = None
        self._others = OtherNodes(store, self._attempt, node.count) if node and not node.rank else None
        self._tail: list[str] = []

    def run(self) -> int:
        started = time.monotonic()
        self._lease.take()
        try:
            return self._run(started)
        finally:
            with told():
                self._lease.release()

    def _run(self, started: float) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._shipper.emit(
            "attempt_started",
            token=self._job.token,
            stage=self._job.stage,
            model=self._job.model,
            host=platform.node(),
            pid=os.getpid(),
        )
        ending = self._train(started) or self._record(started)
        self._conclude(ending)
        return 0 if ending is None else 1

    def _conclude(self, ending: Ending | None) -> None:
        if ending is not None:
            self._shipper.emit("failed", failure=ending.failure.value, message=ending.message)
        with told(f"; the attempt ended with {ending.failure}: {ending.message}" if ending else ""):
            self._shipper.ship()

    def _train(self, started: float) -> Ending | None:
        """Run the training processes to their end; None if that was a good one."""
        process = self._start_training()
        reader = threading.Thread(target=self._read_output, args=(process,), daemon=True)
        reader.start()
        try:
            ending = self._watch_over(process, started)
        except LeaseLost as error:
            ending = Ending(failure=Failure.LOST, message=str(error))
        except Exception as error:
            ending = Ending(
                failure=Failure.FAILED,
                message=f"the supervisor cannot go on: {type(error).__name__}: {error}",
            )
        finally:
            stop_children(grace_s=STOP_GRACE_S, meanwhile=self._keep_up_if_possible)
            assert process.stdin is not None
            process.stdin.close()
        reader.join(timeout=5)
        if ending is None and process.returncode != 0:
            return self._first_cause(self._explain_failure(process.returncode))
        return ending

    def _first_cause(self, mine: Ending) -> Ending:
        """Where other machines take part: theirs, if they failed first or are lost. They get a moment to
        say so, since what is seen of a lost one here is a connection that was closed."""
        if self._others is None:
            return mine
        deadline = time.monotonic() + 1.5 * SILENT_S
        while not self._others.settled and time.monotonic() < deadline:
            self._keep_up_if_possible()
            self._pause()
        theirs = self._others.ending()
        return first_cause([mine, theirs] if theirs else [mine]) or mine

    def _record(self, started: float) -> Ending | None:
        """Write the receipt; None if it is written."""
        try:
            receipt = self._make_receipt(time.monotonic() - started)
            self._lease.renew()  # whoever lost the lease must not replace the receipt of who has it now
            write_receipt(self._store, receipt)
        except LeaseLost as error:
            return Ending(failure=Failure.LOST, message=f"{error}; no receipt is written")
        except (OSError, ValueError, KeyError, StoreError) as error:
            return Ending(
                failure=Failure.FAILED,
                message=f"training ended well, but its result cannot be recorded: {error}",
            )
        try:
            drop_leftovers(self._store, self._job.prefix)
        except (ValueError, StoreError) as error:
            # The stage is complete all the same; what is left over takes room, no more.
            self._shipper.emit("log", level="warning", message=f"old checkpoints were not removed: {error}")
        self._shipper.emit("finished", receipt=receipt.digest(), seconds=round(receipt.seconds, 1))
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = signal.Signals(number).name

    def _start_training(self) -> subprocess.Popen[str]:
        job_path = self._work / "job.json"
        job_path.write_bytes(self._job.to_bytes())
        hardware = self._job.hardware
        script = project_root() / "scripts" / ENTRY_POINTS[self._job.stage]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *(self._node.torchrun_options() if self._node else ["--standalone"]),
            f"--nproc-per-node={hardware.processes}",
            str(script),
            "--job",
            str(job_path),
            "--events",
            str(self._spool),
            "--work",
            str(self._work),
            "--supervised",
        ]
        return subprocess.Popen(
            command,
            # Not --shutdown-timeout: an older torchrun refuses what it does not know.
            env={
                **training_environment(hardware.threads),
                "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_CHECKPOINT_GRACE_S),
            },
            stdin=subprocess.PIPE,  # that it ends tells the workers that this process has
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _read_output(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.rstrip()
            if text:
                self._tail = [*self._tail[-39:], text]
                self._shipper.emit("log", level="info", message=text)

    def _watch_over(self, process: subprocess.Popen[str], started: float) -> Ending | None:
        """Until the training processes have ended (None) or have to be stopped."""
        kept_up_at = time.monotonic()
        while process.poll() is None:
            try:
                self._keep_up()
                kept_up_at = time.monotonic()
            except StoreError:
                # A store may be away for a moment. Before the lease runs out, training has to end.
                if time.monotonic() - kept_up_at > LEASE_TTL_S / 2:
                    raise
            ending = self._reason_to_stop(time.monotonic() - started)
            if ending is not None:
                self._shipper.emit("log", level="warning", message=f"stopping: {ending.message}")
                return ending
            self._pause()
        return None

    def _pause(self) -> None:
        time.sleep(_POLL_S)

    def _keep_up(self) -> None:
        """Ship events; from time to time look around, and at the GPUs."""
        if time.monotonic() >= self._ship_at:
            self._shipper.ship()
            self._ship_at = time.monotonic() + self._ship_every_s
        if time.monotonic() < self._renew_at:
            return
        self._look_around()
        self._renew_at = time.monotonic() + _RENEW_EVERY_S
        usage = gpu_usage()
        if usage:
            self._shipper.emit("gpu", **usage)

    def _look_around(self) -> None:
        """Renew the lease, and see what others want or have come to. Raises LeaseLost, StoreError."""
        self._lease.renew()
        self._cancel = cancel_requested(self._store, self._job.prefix, self._job.token)
        watch = read_lease(self._store, f"{self._job.prefix}/watch.json")
        expires_at = watch.expires_at if watch else None
        if expires_at != self._watch_expires_at:
            self._watch_expires_at, self._watch_seen_at = expires_at, time.monotonic()
        if self._others is not None:
            self._others.look()

    def _keep_up_if_possible(self) -> None:
        # While training is being stopped, whatever else is wrong is no reason to leave it running.
        with contextlib.suppress(StoreError, LeaseLost, ValueError, OSError):
            self._keep_up()

    def _reason_to_stop(self, elapsed_s: float) -> Ending | None:
        job = self._job
        if self._signalled:
            return Ending(failure=Failure.CANCELLED, message=f"asked to stop by {self._signalled}")
        if self._cancel is not None:
            return Ending(failure=Failure.CANCELLED, message=f"asked to stop by {self._cancel.by}")
        trouble = self._others.ending() if self._others else None
        if trouble is not None:
            return trouble
        if elapsed_s > job.deadline_s:
            return Ending(
                failure=Failure.DEADLINE, message=f"ran for {elapsed_s:.0f} s of {job.deadline_s:.0f} s"
            )
        rented = job.rented
        if rented and rented.max_usd is not None and rented.dollars(utc_now()) >= rented.max_usd:
            return Ending(
                failure=Failure.BUDGET,
                message=f"has cost the ${rented.max_usd:.2f} that it may, on {rented.offer}",
            )
        # By this machine's monotonic clock: time that a laptop slept through is no silence.
        silent_s = time.monotonic() - self._watch_seen_at
        if job.watch_grace_s is not None and silent_s > job.watch_grace_s:
            return Ending(
                failure=Failure.CANCELLED,
                message=f"nobody has watched for {silent_s:.0f} s (grace {job.watch_grace_s:.0f} s)",
            )
        return None

    def _explain_failure(self, code: int) -> Ending:
        report = self._work / "error.json"
        if report.exists():
            error = json.loads(report.read_text(encoding="utf-8"))
            return Ending(
                failure=Failure(error.get("failure", Failure.FAILED)),
                message=f"{error['message']}\n{error.get('traceback', '')}".rstrip(),
                at=error.get("time"),
            )
        tail = "\n".join(self._tail[-20:])
        killed = _WORKER_KILLED.search(tail)
        if killed or code < 0:
            name = killed[1] if killed else signal.Signals(-code).name
            return Ending(
                failure=Failure.FAILED,
                message=f"a training process was killed ({name}), by hand or by the system, which does so "
                "where memory runs out. Run it again: it goes on from the last checkpoint",
                at=None,
            )
        return Ending(
            failure=Failure.FAILED,
            message=f"the training processes ended with code {code} and no report; last lines:\n{tail}",
        )

    def _make_receipt(self, seconds: float) -> Receipt:
        job = self._job
        result = json.loads((self._work / "result.json").read_text(encoding="utf-8"))
        outputs = tuple(FileRef.model_validate(file) for file in result["checkpoint"]["files"])
        for file in outputs:
            info = self._store.head(file.key)
            if info is None or info.size != file.size_bytes:
                raise ValueError(f"output {file.key} is not in the store as the trainer said")
        return Receipt(
            stage=job.stage,
            stage_version=job.stage_version,
            fingerprint=job.fingerprint,
            token=job.token,
            created_at=utc_now(),
            seconds=seconds,
            inputs=job.inputs,
            data=job.data,
            outputs=outputs,
            metrics=result.get("metrics", {}),
            tables=result.get("tables", {}),
            samples=tuple(result.get("samples", ())),
            warnings=tuple(result.get("warnings", ())),
            attempts=self._attempts(result.get("attempts", ()), seconds),
            code_revision=job.code_revision,
            sources_sha256=job.sources_sha256,
            image_digest=job.image,
            hardware={
                "host": platform.node(),
                "machine": platform.machine(),
                **({"nodes": self._node.count} if self._node else {}),
                **result.get("hardware", {}),
            },
            events_key=f"{self._attempt}/events.jsonl",
        )

    def _attempts(self, worked: list[dict[str, Any]], seconds: float) -> tuple[AttemptCost, ...]:
        """What every attempt at this training took and cost: earlier ones as the trainer and the
        orchestrator know them, then ours."""
        job = self._job
        # A checkpoint of an older version does not tell how long the attempts before it took.
        trained = {attempt["token"]: attempt["seconds"] or 0.0 for attempt in worked}
        earlier = (
            AttemptCost(
                token=token,
                seconds=trained.get(token, 0.0),
                dollars=job.paid.get(token, 0.0),
                outcome="interrupted",
            )
            for token in sorted({*trained, *job.paid} - {job.token})
        )
        dollars = job.rented.dollars(utc_now()) if job.rented else 0.0
        return (*earlier, AttemptCost(token=job.token, seconds=seconds, dollars=dollars))


@contextlib.contextmanager
def told(more: str = "") -> Iterator[None]:
    """What the store does not take is said on standard error, where the launcher looks for last words."""
    try:
        yield
    except StoreError as error:
        print(f"the supervisor cannot report: {error}{more}", file=sys.stderr)


def training_environment(threads: int) -> dict[str, str]:
    """The environment of the training processes."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _adopt_orphans() -> None:
    """Linux: the workers of a torchrun that was killed become this process's own children."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def stop_process_tree(pid: int, *, grace_s: float) -> None:
    """SIGTERM to the process, SIGKILL after `grace_s` to all that is left of its tree."""
    import psutil

    try:
        root = psutil.Process(pid)
        _stop([root], [root, *root.children(recursive=True)], grace_s)
    except psutil.NoSuchProcess:
        return


def stop_children(*, grace_s: float, meanwhile: Callable[[], None]) -> None:
    """The same for all that this process has started; `meanwhile` is called again and again."""
    import psutil

    me = psutil.Process()
    _stop(me.children(), me.children(recursive=True), grace_s, meanwhile)


def _stop(
    asked: list[psutil.Process],
    family: list[psutil.Process],
    grace_s: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    import psutil

    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + grace_s
    alive = family
    while alive and time.monotonic() < deadline:
        _, alive = psutil.wait_procs(alive, timeout=_POLL_S)
        meanwhile()
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


@contextlib.contextmanager
def work_folder(job: TrainingJob) -> Iterator[Path]:
    """A place for what the training writes, gone after the block; what it leaves running becomes ours."""
    _adopt_orphans()
    work = Path(tempfile.mkdtemp(prefix=f"nanochat-{job.stage}-"))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def supervise(store: ObjectStore, job: TrainingJob, node: Node | None = None) -> int:
    """Run the job's attempt, as the first node of several where `node` is one. The exit code: 0 with a
    receipt, 1 without."""
    with work_folder(job) as work:
        return Supervisor(store, job, work, node).run()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="URL of the store")
    parser.add_argument("--job", required=True, help="key of job.json in the store")
    options = parser.parse_args(arguments)
    store = open_store(options.store)
    return supervise(store, TrainingJob.read(store, options.job))


if __name__ == "__main__":
    sys.exit(main())
