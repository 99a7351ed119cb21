"""The local launcher: the supervisor as a process of its own session on this machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from dagster_nanochat.launch.base import THREADS_ENV, Handle, Offer, Patience, Request, number_setting
from nanochat.machine import this_machine, usable_cores
from nanochat.recipes import Hardware
from nanochat.store import ObjectStore
from nanochat.store.leases import machine_name, read_lease
from nanochat.supervisor import STOP_GRACE_S, stop_process_tree, training_environment
from nanochat.training.job import JobHardware, Rented, TrainingJob

PROCESSES_ENV = "NANOCHAT_PROCESSES"


def _log_path(token: str) -> Path:
    """Standard error of a supervisor: empty unless it could not even report to the store."""
    return Path(tempfile.gettempdir()) / f"nanochat-supervisor-{token}.log"


class LocalLauncher:
    """Runs attempts on this machine for nothing an hour."""

    name = "local"
    max_machines = 1
    patience: Patience | None = None

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def offers(self, request: Request, flops: float | None = None) -> list[Offer]:
        machine = this_machine()
        return [
            Offer(
                name=machine.describe(request.gpus),
                price_usd_per_h=0.0,
                flops_per_s=machine.training_flops_per_s(request.gpus),
            )
        ]

    def hardware(self, wanted: Hardware, offer: Offer) -> JobHardware:
        """One process a GPU, or one for the CPU; the cores are shared out among them. Raises
        AttemptFailed for a setting that is no number."""
        processes = number_setting(PROCESSES_ENV, default=this_machine().processes(wanted.gpus))
        return JobHardware(
            processes=processes,
            threads=number_setting(THREADS_ENV, default=max(1, usable_cores() // processes)),
            device_batch_rows=wanted.device_batch_rows,
        )

    def slots(self) -> list[str]:
        """One training at a time on this machine."""
        return [f"slots/{machine_name()}/0.json"]

    def rent(self, offer: Offer, max_usd: float) -> Rented | None:
        return None

    def image(self) -> str | None:
        return None

    def launch(self, job: TrainingJob, offer: Offer) -> Handle:
        key = f"{job.attempt_prefix}/job.json"
        self._store.put(key, job.to_bytes())
        # A session of its own: the supervisor outlives the orchestrator that started it.
        with _log_path(job.token).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nanochat.supervisor", "--store", self._store.url, "--job", key],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=training_environment(job.hardware.threads),
                start_new_session=True,
            )
        self._children[job.token] = process
        return Handle(launcher=self.name, token=job.token, id=str(process.pid))

    def find(self, prefix: str) -> Handle | None:
        lease = read_lease(self._store, f"{prefix}/lease.json")
        if lease is None or lease.host != machine_name():
            return None
        handle = Handle(launcher=self.name, token=lease.token, id=str(lease.pid))
        return handle if self.alive(handle) else None

    def alive(self, handle: Handle) -> bool:
        child = self._children.get(handle.token)
        if child is not None:
            return child.poll() is None
        try:
            process = psutil.Process(int(handle.id))
            return process.status() != psutil.STATUS_ZOMBIE and "nanochat.supervisor" in process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def trouble(self, handle: Handle) -> str | None:
        return None

    def last_words(self, handle: Handle) -> str:
        """What an ended supervisor wrote to its standard error. The caller tells it; it is kept no longer."""
        path = _log_path(handle.token)
        try:
            words = path.read_text(encoding="utf-8", errors="replace")[-4000:]
        except FileNotFoundError:
            return ""
        path.unlink(missing_ok=True)
        return words

    def terminate(self, handle: Handle, outcome: str = "") -> None:
        if self.alive(handle):
            # The supervisor gives its training STOP_GRACE_S, and reports what came of it.
            stop_process_tree(int(handle.id), grace_s=STOP_GRACE_S + 15)
        deadline = time.monotonic() + 10
        while self.alive(handle):
            if time.monotonic() > deadline:
                raise TimeoutError(f"supervisor process {handle.id} of attempt {handle.token} will not end")
            time.sleep(0.1)
        _log_path(handle.token).unlink(missing_ok=True)
