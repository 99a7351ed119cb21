"""What runs first on any machine: one attempt of one training stage, from job to receipt.

    python -m nanochat.supervisor --store file:///… --job stages/base/…/attempts/…/job.json

It holds the attempt's lease while it lives, runs torchrun, ships events to the store, enforces the
deadline, ends when nobody has watched for too long, verifies what training left behind, and writes
the receipt. A signal (SIGTERM, SIGINT) asks for the same orderly end as the deadline. It knows no
provider: a launcher that rents machines adds how to end one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from nanochat.events import encode_event
from nanochat.failures import Failure
from nanochat.machine import gpu_usage
from nanochat.store import ObjectStore, open_store, project_root
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import LeaseKeeper, LeaseLost, read_lease, utc_now
from nanochat.store.objects import StoreError
from nanochat.store.receipts import AttemptCost, FileRef, Receipt, write_receipt
from nanochat.training.job import TrainingJob

LEASE_TTL_S = 30.0
_RENEW_EVERY_S = 5.0
_POLL_S = 0.25
_STOP_GRACE_S = 60.0

ENTRY_POINTS = {
    "base": "train_base_remote.py",
    "midtrain": "train_midtraining_remote.py",
    "sft": "train_sft_remote.py",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ending:
    failure: Failure
    message: str


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
        with self._lock:
            lines, self._pending = self._pending, []
        if self._spool.exists():
            with self._spool.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            lines.append(whole)
        joined = b"".join(lines)
        if joined:
            self._store.append(self._key, joined)


class Supervisor:
    """One attempt. `run()` returns the exit code: 0 with a receipt, 1 without."""

    def __init__(self, store: ObjectStore, job: TrainingJob, work: Path) -> None:
        self._store = store
        self._job = job
        self._work = work
        self._spool = work / "events.jsonl"
        self._attempt = attempt_prefix(job.prefix, job.token)
        self._shipper = EventShipper(store, f"{self._attempt}/events.jsonl", self._spool)
        self._lease = LeaseKeeper(
            store, f"{job.prefix}/lease.json", token=job.token, owner="supervisor", ttl_s=LEASE_TTL_S
        )
        self._signalled: str | None = None
        self._tail: list[str] = []

    def run(self) -> int:
        started = time.monotonic()
        self._lease.take()
        try:
            return self._run(started)
        finally:
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
        process = self._start_training()
        reader = threading.Thread(target=self._read_output, args=(process,), daemon=True)
        reader.start()
        ending = self._watch_over(process, started)
        reader.join(timeout=5)
        if ending is None and process.returncode != 0:
            ending = self._explain_failure(process.returncode)
        if ending is None:
            try:
                receipt = self._make_receipt(time.monotonic() - started)
                write_receipt(self._store, receipt)
            except (OSError, ValueError, KeyError, StoreError) as error:
                ending = _Ending(
                    failure=Failure.FAILED,
                    message=f"training ended well, but its result cannot be recorded: {error}",
                )
            else:
                self._shipper.emit("finished", receipt=receipt.digest(), seconds=round(receipt.seconds, 1))
        if ending is not None:
            self._shipper.emit("failed", failure=ending.failure.value, message=ending.message)
        self._shipper.ship()
        return 0 if ending is None else 1

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
            "--standalone",
            f"--nproc-per-node={hardware.processes}",
            str(script),
            "--job",
            str(job_path),
            "--events",
            str(self._spool),
            "--work",
            str(self._work),
        ]
        return subprocess.Popen(
            command,
            env=training_environment(hardware.threads),
            stdin=subprocess.DEVNULL,
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

    def _watch_over(self, process: subprocess.Popen[str], started: float) -> _Ending | None:
        """Until the training processes have ended; None if nothing but themselves ended them."""
        renew_at = time.monotonic() + _RENEW_EVERY_S
        while process.poll() is None:
            self._shipper.ship()
            now = time.monotonic()
            ending = self._reason_to_stop(now - started)
            if now >= renew_at:
                renew_at = now + _RENEW_EVERY_S
                usage = gpu_usage()
                if usage:
                    self._shipper.emit("gpu", **usage)
                try:
                    self._lease.renew()
                except LeaseLost as error:
                    ending = _Ending(failure=Failure.LOST, message=str(error))
            if ending is not None:
                self._shipper.emit("log", level="warning", message=f"stopping: {ending.message}")
                stop_process_tree(process.pid, grace_s=_STOP_GRACE_S)
                process.wait()
                return ending
            time.sleep(_POLL_S)
        return None

    def _reason_to_stop(self, elapsed_s: float) -> _Ending | None:
        job = self._job
        if self._signalled:
            return _Ending(failure=Failure.CANCELLED, message=f"asked to stop by {self._signalled}")
        if elapsed_s > job.deadline_s:
            return _Ending(
                failure=Failure.DEADLINE, message=f"ran for {elapsed_s:.0f} s of {job.deadline_s:.0f} s"
            )
        if job.watch_grace_s is not None and elapsed_s > job.watch_grace_s:
            watch = read_lease(self._store, f"{job.prefix}/watch.json")
            silent = (utc_now() - watch.expires_at).total_seconds() if watch else elapsed_s
            if watch is None or silent > job.watch_grace_s:
                return _Ending(
                    failure=Failure.CANCELLED,
                    message=f"nobody has watched for {silent:.0f} s (grace {job.watch_grace_s:.0f} s)",
                )
        return None

    def _explain_failure(self, code: int) -> _Ending:
        report = self._work / "error.json"
        if report.exists():
            error = json.loads(report.read_text(encoding="utf-8"))
            return _Ending(
                failure=Failure(error.get("failure", Failure.FAILED)),
                message=f"{error['message']}\n{error.get('traceback', '')}".rstrip(),
            )
        tail = "\n".join(self._tail[-20:])
        return _Ending(
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
            attempts=(AttemptCost(token=job.token, seconds=seconds),),
            code_revision=job.code_revision,
            sources_sha256=job.sources_sha256,
            hardware={"host": platform.node(), "machine": platform.machine(), **result.get("hardware", {})},
            events_key=f"{self._attempt}/events.jsonl",
        )


def training_environment(threads: int) -> dict[str, str]:
    """The environment of the training processes.

    GOMP_SPINCOUNT bounds how long OpenMP threads spin before they sleep: with the default, training
    beside another busy process slows tenfold (measured, reference of the quick model).
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "30000"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def stop_process_tree(pid: int, *, grace_s: float) -> None:
    """SIGTERM to the process, SIGKILL after `grace_s` to all that is left of its tree."""
    import psutil

    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    root.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="URL of the store")
    parser.add_argument("--job", required=True, help="key of job.json in the store")
    options = parser.parse_args(arguments)
    store = open_store(options.store)
    job = TrainingJob.read(store, options.job)
    work = Path(tempfile.mkdtemp(prefix=f"nanochat-{job.stage}-"))
    try:
        return Supervisor(store, job, work).run()
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
