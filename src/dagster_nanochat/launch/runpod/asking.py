"""One question to a serverless endpoint: queued, waited for, cancelled when nobody waits for it any more."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.endpoint_models import Endpoint, Job, JobPolicy, JobRequest, JobStatus
from dagster_nanochat.launch.runpod.errors import NotFound, RunPodError
from dagster_nanochat.launch.runpod.jobs import JobClient
from dagster_nanochat.launch.runpod.pools import pools_of
from nanochat.failures import AttemptFailed, Failure

POLL_S = 1.0
# So long a worker may take to answer, once it has begun.
EXECUTION_S = 300.0

Pause = Callable[[float], None]
"""Waits for so many seconds, and raises where nobody wants to go on."""

Say = Callable[[str], None]


class Usage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Said(BaseModel):
    """What a worker answers (see `nanochat.serving.jobs`)."""

    model_config = ConfigDict(extra="ignore")

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    receipt_sha256: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """text: never empty. seconds: from the question to the answer, of these waited_s in the queue and
    execution_s in the worker. cold_start: no worker was there when it was asked. usd: what the worker's
    seconds cost, of its start (where the question caused it) and of the answering; None where its price is
    not told."""

    text: str
    tokens: int
    finish_reason: str
    receipt_sha256: str | None
    job: str
    worker: str | None
    gpu_type_id: str | None
    cold_start: bool
    seconds: float
    waited_s: float
    execution_s: float
    usd: float | None

    def metadata(self) -> dict[str, Any]:
        """As Dagster shows it."""
        told = {
            "answer": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "seconds": self.seconds,
            "cold_start": self.cold_start,
            "waited_s": self.waited_s,
            "execution_s": self.execution_s,
            "dollars": self.usd,
            "gpu": self.gpu_type_id,
            "worker": self.worker,
            "job": self.job,
            "receipt": self.receipt_sha256[:12] if self.receipt_sha256 else None,
        }
        return {name: value for name, value in told.items() if value is not None}


def ask(
    client: RunPodClient,
    endpoint: Endpoint,
    question: Mapping[str, Any],
    *,
    within_s: float,
    pause: Pause = time.sleep,
    say: Say,
    hear: Callable[[Any], None] | None = None,
) -> Answer:
    """The answer to a job with `question` as its input.

    hear: called with every piece of a streamed answer as it comes.

    Whatever ends the waiting ends the job, too. Raises AttemptFailed (FAILED where the worker says so or says
    nothing, DEADLINE after within_s, LOST where RunPod has forgotten the job), RunPodError, and what pause
    raises.
    """
    with client.jobs(endpoint) as jobs:
        start = time.monotonic()
        cold = not jobs.health().workers.warm
        if cold:
            say(f"{endpoint.name}: no worker is there, one is started for the question")
        policy = JobPolicy(execution_timeout=round(1000 * EXECUTION_S), ttl=round(1000 * within_s) + 1000)
        job = jobs.run(JobRequest(input=dict(question), policy=policy))
        try:
            job = _final(jobs, job, endpoint, deadline=start + within_s, pause=pause, hear=hear)
        except BaseException:
            _cancel(jobs, job.id, say)
            raise
        seconds = time.monotonic() - start
    said = _said(endpoint, job)
    waited_s, execution_s = (job.delay_time or 0) / 1000, (job.execution_time or 0) / 1000
    gpu_type_id, usd_per_h = _worker_price(client, endpoint, job)
    busy_s = execution_s + (waited_s if cold else 0.0)
    return Answer(
        text=said.text,
        tokens=said.usage.completion_tokens if said.usage else 0,
        finish_reason=said.finish_reason or "not told",
        receipt_sha256=said.receipt_sha256,
        job=job.id,
        worker=job.worker_id,
        gpu_type_id=gpu_type_id,
        cold_start=cold,
        seconds=seconds,
        waited_s=waited_s,
        execution_s=execution_s,
        usd=None if usd_per_h is None else busy_s * usd_per_h / 3600,
    )


def _final(
    jobs: JobClient,
    job: Job,
    endpoint: Endpoint,
    *,
    deadline: float,
    pause: Pause,
    hear: Callable[[Any], None] | None,
) -> Job:
    while not job.status.final:
        if time.monotonic() > deadline:
            raise AttemptFailed(
                Failure.DEADLINE,
                f"endpoint {endpoint.name} has not answered in time; job {job.id} is {job.status}, and the "
                f"workers are: {_workers(jobs)}",
            )
        pause(POLL_S)
        try:
            if hear:
                for piece in jobs.stream(job.id).stream:
                    hear(piece.output)
            job = jobs.status(job.id)
        except NotFound as error:
            raise AttemptFailed(Failure.LOST, f"RunPod has forgotten job {job.id}: {error}") from error
    return job


def _workers(jobs: JobClient) -> str:
    try:
        return jobs.health().workers.describe()
    except RunPodError as error:
        return f"not told ({error})"


def _cancel(jobs: JobClient, job_id: str, say: Say) -> None:
    """What cannot be cancelled ends by its policy."""
    try:
        jobs.cancel(job_id)
        say(f"job {job_id} is cancelled")
    except RunPodError as error:
        say(f"job {job_id} could not be cancelled, and ends by itself: {error}")


def _said(endpoint: Endpoint, job: Job) -> Said:
    """Raises AttemptFailed for what is no answer."""
    what = f"job {job.id} of endpoint {endpoint.name}"
    if job.status is not JobStatus.COMPLETED:
        failures = {JobStatus.CANCELLED: Failure.CANCELLED, JobStatus.TIMED_OUT: Failure.DEADLINE}
        raise AttemptFailed(
            failures.get(job.status, Failure.FAILED), f"{what} is {job.status}{_reason(job.error)}"
        )
    pieces = job.output if isinstance(job.output, list) else [job.output]
    output = pieces[-1] if pieces else None
    if isinstance(output, dict) and output.get("error"):
        raise AttemptFailed(Failure.FAILED, f"{what} answered with an error{_reason(output['error'])}")
    try:
        said = Said.model_validate(output)
    except ValidationError as error:
        raise AttemptFailed(
            Failure.FAILED,
            f"{what} gave what is no answer of a nanochat worker: does the endpoint run the image that "
            "nanochat_serverless_image has pinned?",
        ) from error
    # What is streamed comes in pieces before it.
    text = "".join(str(piece["text"]) for piece in pieces if isinstance(piece, dict) and "text" in piece)
    said = said.model_copy(update={"text": text})
    if not said.text.strip():
        raise AttemptFailed(Failure.FAILED, f"{what} answered nothing")
    return said


def _reason(error: Any) -> str:
    """What a worker's error says, without its traceback."""
    if isinstance(error, str):
        with contextlib.suppress(ValueError):
            error = json.loads(error)
    if isinstance(error, dict):
        error = error.get("message") or error.get("error_message") or error
    text = str(error or "").strip()
    return f": {text.splitlines()[0][:500]}" if text else ""


def _worker_price(client: RunPodClient, endpoint: Endpoint, job: Job) -> tuple[str | None, float | None]:
    """The GPU of the worker that has answered, and USD an hour of it; of the endpoint's dearest pool where
    the worker is gone already."""
    try:
        workers = {worker.id: worker for worker in client.endpoint_workers(endpoint.id).workers}
        catalog = client.gpu_types("SERVERLESS", with_availability=False)
    except RunPodError:
        return None, None  # the answer is there; what it cost is RunPod's bill to tell
    count = endpoint.gpu.count if endpoint.gpu else 1
    worker = workers.get(job.worker_id or "")
    for gpu_type in catalog:
        if worker is not None and gpu_type.id == worker.gpu_type_id and gpu_type.price.serverless:
            return gpu_type.id, count * gpu_type.price.serverless
    names = endpoint.gpu.pools if endpoint.gpu else ()
    prices = [pool.usd_per_h for pool in pools_of(catalog) if pool.name in names and pool.usd_per_h]
    return None, count * max(prices) if prices else None
