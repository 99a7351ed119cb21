"""The jobs of a queue endpoint: what was asked, where it stands, what came of it."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
import uuid
from collections import deque
from typing import Any

from emulators.runpod.problems import Problem
from emulators.runpod.settings import Settings

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


_TOLD_TIMES, _TOLD_EVERY_S = 8, 0.25


@dataclasses.dataclass(kw_only=True)
class _Order:
    """To stop a job: when it is told next, and how often still."""

    job: str
    at: float = 0.0
    left: int = _TOLD_TIMES


@dataclasses.dataclass(kw_only=True)
class Job:
    """Moments are of the monotonic clock. chunks: what was streamed and not read yet."""

    id: str
    input: Any
    sync: bool
    execution_timeout_s: float
    ttl_s: float
    submitted: float
    status: str = "IN_QUEUE"
    worker: str | None = None
    taken: float | None = None
    ended: float | None = None
    retries: int = 0
    output: Any = None
    error: str | None = None
    chunks: list[Any] = dataclasses.field(default_factory=list)

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    def document(self) -> dict[str, Any]:
        """As /status tells it."""
        told: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.taken is not None:
            told["delayTime"] = round((self.taken - self.submitted) * 1000)
            told["workerId"] = self.worker
        if self.taken is not None and self.ended is not None:
            told["executionTime"] = round((self.ended - self.taken) * 1000)
        if self.retries:
            told["retries"] = self.retries
        if self.error is not None:
            told["error"] = self.error
        elif self.output is not None:
            told["output"] = self.output
        return told


class Jobs:
    """Safe to use from several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._to_stop: dict[str, list[_Order]] = {}
        self._counts = dict.fromkeys(("completed", "failed", "retried"), 0)
        self._lock = threading.RLock()

    # -- who asks ----------------------------------------------------------------------------------

    def submit(self, body: dict[str, Any], *, sync: bool, timeout_s: float) -> Job:
        """body: `input` and perhaps `policy`. timeout_s: the endpoint's own."""
        policy = body.get("policy", {})
        job = Job(
            id=f"{'sync-' if sync else ''}{uuid.uuid4()}-u{secrets.randbelow(9) + 1}",
            input=body["input"],
            sync=sync,
            execution_timeout_s=policy.get("executionTimeout", timeout_s * 1000) / 1000,
            ttl_s=policy.get("ttl", self._settings.job_ttl_s * 1000) / 1000,
            submitted=time.monotonic(),
        )
        with self._lock:
            self._jobs[job.id] = job
            self._queue.append(job)
        return job

    def job(self, id: str) -> Job:
        """Raises Problem where there is none, or no longer."""
        self.tidy()
        with self._lock:
            if id not in self._jobs:
                raise Problem(404, "request does not exist")
            return self._jobs[id]

    def drain(self, job: Job) -> list[Any]:
        """What was streamed since the last time."""
        with self._lock:
            chunks, job.chunks = job.chunks, []
            return chunks

    def cancel(self, id: str) -> Job:
        job = self.job(id)
        with self._lock:
            if not job.is_final:
                self._stop(job, "CANCELLED")
        return job

    def retry(self, id: str) -> Job:
        """Raises Problem unless it failed or timed out."""
        job = self.job(id)
        with self._lock:
            if job.status not in ("FAILED", "TIMED_OUT"):
                raise Problem(400, f"a job that is {job.status} cannot be retried")
            self._requeue(job)
        return job

    def purge(self) -> int:
        """How many were waiting."""
        with self._lock:
            waiting, self._queue = list(self._queue), deque()
            for job in waiting:
                self._end(job, "CANCELLED")
            return len(waiting)

    # -- workers -----------------------------------------------------------------------------------

    def take(self, worker: str, most: int) -> list[Job]:
        """What a worker is given. A job with an empty input never reaches one."""
        taken: list[Job] = []
        with self._lock:
            while self._queue and len(taken) < most:
                job = self._queue.popleft()
                job.status, job.worker, job.taken = "IN_PROGRESS", worker, time.monotonic()
                if job.input:
                    taken.append(job)
                else:
                    self._end(job, "FAILED", error="job timed out after 1 retries")
        return taken

    def stream(self, worker: str, id: str, document: dict[str, Any]) -> None:
        with self._lock:
            job = self._held(worker, id)
            if job is not None:
                job.chunks.append(document.get("output"))

    def done(self, worker: str, id: str, document: dict[str, Any]) -> None:
        """A result or a progress update. What comes for a job that has ended changes nothing."""
        with self._lock:
            job = self._held(worker, id)
            if job is None:
                return
            if document.get("status") == "IN_PROGRESS":
                job.output = document.get("output")
            elif document.get("error"):
                self._end(job, "FAILED", error=str(document["error"]))
            else:
                job.output = document.get("output")
                self._end(job, "COMPLETED")

    def to_stop(self, worker: str) -> list[str]:
        """Told some times over: the SDK drops the order to stop a job that it has taken and not begun."""
        now = time.monotonic()
        with self._lock:
            orders = [order for order in self._to_stop.get(worker, []) if order.left]
            due = [order for order in orders if order.at <= now]
            for order in due:
                order.at, order.left = now + _TOLD_EVERY_S, order.left - 1
            self._to_stop[worker] = orders
            return [order.job for order in due]

    def lost(self, worker: str) -> None:
        """The worker is gone: its jobs go back to the front of the queue, and fail at the second time."""
        with self._lock:
            for job in self.of(worker):
                if job.retries < self._settings.job_retries:
                    self._requeue(job)
                else:
                    self._end(job, "FAILED", error=f"job timed out after {job.retries} retries")
            self._to_stop.pop(worker, None)

    # -- the endpoint ------------------------------------------------------------------------------

    def of(self, worker: str) -> list[Job]:
        with self._lock:
            return [
                job for job in self._jobs.values() if job.status == "IN_PROGRESS" and job.worker == worker
            ]

    def waiting(self) -> int:
        with self._lock:
            return len(self._queue)

    def running(self) -> int:
        with self._lock:
            return sum(job.status == "IN_PROGRESS" for job in self._jobs.values())

    def waited_s(self) -> float:
        """How long the first of the queue has waited; 0 where none does."""
        with self._lock:
            return time.monotonic() - self._queue[0].submitted if self._queue else 0.0

    def counts(self) -> dict[str, int]:
        return {**self._counts, "inProgress": self.running(), "inQueue": self.waiting()}

    def tidy(self) -> None:
        """End what takes too long, forget what is too old."""
        now = time.monotonic()
        with self._lock:
            for job in list(self._jobs.values()):
                if job.ended is not None:
                    kept_s = self._settings.sync_result_kept_s if job.sync else self._settings.result_kept_s
                    if now - job.ended > kept_s:
                        del self._jobs[job.id]
                elif now - job.submitted > job.ttl_s:
                    self._stop(job, "TIMED_OUT")
                    del self._jobs[job.id]
                elif job.taken is not None and now - job.taken > job.execution_timeout_s:
                    self._stop(job, "TIMED_OUT")

    def _held(self, worker: str, id: str) -> Job | None:
        """The job, if this worker is still the one that works on it."""
        job = self._jobs.get(id)
        return job if job and job.status == "IN_PROGRESS" and job.worker == worker else None

    def _requeue(self, job: Job) -> None:
        job.status, job.worker, job.taken, job.ended = "IN_QUEUE", None, None, None
        job.output = job.error = None
        job.chunks = []
        job.retries += 1
        self._counts["retried"] += 1
        self._queue.appendleft(job)

    def _stop(self, job: Job, status: str) -> None:
        """Whether it waits or runs."""
        if job.status == "IN_PROGRESS":
            assert job.worker is not None
            self._to_stop.setdefault(job.worker, []).append(_Order(job=job.id))
        else:
            self._queue.remove(job)
        self._end(job, status)

    def _end(self, job: Job, status: str, *, error: str | None = None) -> None:
        job.status, job.error, job.ended = status, error, time.monotonic()
        if status == "COMPLETED":
            self._counts["completed"] += 1
        elif status != "CANCELLED":
            self._counts["failed"] += 1
