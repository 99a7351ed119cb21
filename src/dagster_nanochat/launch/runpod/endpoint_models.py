"""Bodies of RunPod's serverless endpoints and of their jobs: what is sent, exactly; what comes back, as far
as we read it (see `models`)."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from dagster_nanochat.launch.runpod.models import MAX_ENVIRONMENT, Answer, Billing, CudaVersion, RequestBody

# --------------------------------------------------------------------------------------------------
# Requests


class QueueDelay(RequestBody):
    """Another worker is started when a job has waited for so many seconds."""

    type: str = "QUEUE_DELAY"
    queue_delay: float = Field(ge=0.5)


class EndpointGpu(RequestBody):
    """Any GPU of the pools will do. count: of each worker."""

    pools: tuple[str, ...] = Field(min_length=1)
    count: int = Field(default=1, ge=1)
    min_cuda_version: CudaVersion | None = None


class WorkerLimits(RequestBody):
    """How many workers there may be. idle_timeout: seconds that one without a job is kept, and paid for."""

    min: int = Field(ge=0)
    max: int = Field(ge=0)
    idle_timeout: int | None = Field(default=None, ge=1, le=3600)


class EndpointChange(RequestBody):
    """What is to be changed of an endpoint; None leaves it as it is. timeout: milliseconds of one job."""

    image: str | None = Field(default=None, min_length=1)
    env: dict[str, str] | None = Field(default=None, max_length=MAX_ENVIRONMENT, repr=False)
    disk: int | None = Field(default=None, ge=1)
    gpu: EndpointGpu | None = None
    workers: WorkerLimits | None = None
    scaling: QueueDelay | None = None
    timeout: int | None = Field(default=None, ge=1)
    data_center_ids: tuple[str, ...] | None = None
    registry: str | None = None


class EndpointRequest(EndpointChange):
    """A new endpoint, whose jobs wait in a queue."""

    name: str = Field(min_length=1)
    type: str = "QUEUE"
    image: str = Field(min_length=1)
    workers: WorkerLimits
    scaling: QueueDelay

    def as_change(self) -> EndpointChange:
        """The same of an endpoint that is there already."""
        return EndpointChange(**{name: getattr(self, name) for name in EndpointChange.model_fields})


# --------------------------------------------------------------------------------------------------
# Answers


class RequestUrls(Answer):
    """Where jobs are sent. status, stream and cancel have ``{job_id}`` in them."""

    run: str
    status: str
    stream: str
    cancel: str
    health: str


class EndpointGpuTold(Answer):
    pools: tuple[str, ...] = ()
    count: int = 1
    min_cuda_version: str | None = None


class WorkerLimitsTold(Answer):
    min: int = 0
    max: int = 0
    idle_timeout: int | None = None


class ScalingTold(Answer):
    type: str | None = None
    queue_delay: float | None = None


class Endpoint(Answer):
    """request_urls: those of `RequestUrls`, but where requests do not wait in a queue. timeout: milliseconds
    of a job."""

    id: str
    name: str = ""
    type: str | None = None
    image: str | None = None
    env: dict[str, str] | None = Field(default=None, repr=False)
    disk: int | None = None
    gpu: EndpointGpuTold | None = None
    workers: WorkerLimitsTold = WorkerLimitsTold()
    scaling: ScalingTold | None = None
    timeout: int | None = None
    data_center_ids: tuple[str, ...] = ()
    registry: str | None = None
    request_urls: dict[str, str] | None = None
    created_at: datetime | None = None


class WorkerStatus(enum.StrEnum):
    """THROTTLED: it waits for a machine that is free."""

    RUNNING = "RUNNING"
    IDLE = "IDLE"
    INITIALIZING = "INITIALIZING"
    THROTTLED = "THROTTLED"
    UNHEALTHY = "UNHEALTHY"


class Worker(Answer):
    """is_stale: it runs an older release than the endpoint's newest."""

    id: str
    status: Annotated[WorkerStatus | str | None, Field(union_mode="left_to_right")] = None
    is_stale: bool = False
    version: int | None = None
    image: str | None = None
    gpu_type_id: str | None = None


class EndpointWorkers(Answer):
    """endpoint_version: the newest release's."""

    workers: tuple[Worker, ...]
    endpoint_version: int | None = None


class Rollout(Answer):
    """How many workers are on the newest release."""

    in_progress: bool
    workers_on_latest: int = 0
    workers_total: int = 0


class Releases(Answer):
    endpoint_version: int | None = None
    rollout: Rollout


class ServerlessBilling(Billing):
    serverless_id: str


# --------------------------------------------------------------------------------------------------
# Jobs


class JobPolicy(RequestBody):
    """Milliseconds: that a job may run, and that it may exist."""

    execution_timeout: int = Field(ge=1000)
    ttl: int = Field(ge=1000)


class JobRequest(RequestBody):
    """input must have something in it: a job with an empty one is dropped (runpod.md, section 4)."""

    input: dict[str, Any] = Field(min_length=1, repr=False)
    policy: JobPolicy

    def body(self) -> dict[str, Any]:
        # What the input says is its worker's business: a null in it is sent.
        return {"input": self.input, "policy": self.policy.body()}


class JobStatus(enum.StrEnum):
    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def final(self) -> bool:
        return self not in (JobStatus.IN_QUEUE, JobStatus.IN_PROGRESS)


class Job(Answer):
    """delay_time, execution_time: milliseconds that it has waited and run."""

    id: str
    status: JobStatus
    output: Any = Field(default=None, repr=False)
    error: Any = None
    worker_id: str | None = None
    delay_time: float | None = None
    execution_time: float | None = None


class StreamedPiece(Answer):
    output: Any = None


class JobStream(Answer):
    """What has come since the last time it was asked."""

    status: JobStatus
    stream: tuple[StreamedPiece, ...] = ()


class WorkerCounts(Answer):
    idle: int = 0
    initializing: int = 0
    ready: int = 0
    running: int = 0
    throttled: int = 0
    unhealthy: int = 0

    @property
    def warm(self) -> bool:
        """Whether there is one that could take a job at once."""
        return self.idle + self.ready + self.running > 0

    def describe(self) -> str:
        counts = {name: getattr(self, name) for name in type(self).model_fields if name != "ready"}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


class Health(Answer):
    workers: WorkerCounts = WorkerCounts()
