"""Bodies of RunPod's REST API v2: what is sent, exactly; what comes back, as far as we read it.

An answer may have fields that we do not know, and may lack any but its id: a machine whose description
surprises us must still be found and deleted. A request has no field that the API does not know, since
one such field is refused (422).
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Cloud = Literal["SECURE", "COMMUNITY"]
Product = Literal["POD", "CLUSTER", "SERVERLESS"]
LogSource = Literal["container", "system"]
CudaVersion = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
# RunPod takes so many variables of a container.
MAX_ENVIRONMENT = 50


class PodStatus(enum.StrEnum):
    """RUNNING may be said while the image is still pulled; only our own heartbeat says more."""

    PROVISIONING = "PROVISIONING"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    EXITED = "EXITED"
    ERROR = "ERROR"
    TERMINATED = "TERMINATED"


class Stock(enum.StrEnum):
    """How many machines of a kind are free, in the catalog's words."""

    NONE = "NONE"
    LOW = "LOW"
    MEDIUM = "MEDIUM"
    HIGH = "HIGH"


# --------------------------------------------------------------------------------------------------
# Requests


class RequestBody(BaseModel):
    """Base of what is sent."""

    # Environments hold secrets: no error shows what was put in.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    def body(self) -> dict[str, Any]:
        """The JSON to send."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class PersistentMount(RequestBody):
    """Volume disk of the pod's own host, in GB."""

    size: int = Field(ge=10)
    path: str


class Mounts(RequestBody):
    persistent: PersistentMount | None = None


class GpuRequest(RequestBody):
    """min_ram_per_gpu: GiB of main memory. It is newer than the specification at hand."""

    id: str
    count: int = Field(default=1, ge=1)
    min_cuda_version: CudaVersion | None = None
    min_ram_per_gpu: int | None = Field(default=None, ge=1)


class _ContainerRequest(RequestBody):
    """args: what the image's entrypoint is given, split at blanks. disk: GB, lost with the pod."""

    name: str = Field(min_length=1)
    image: str = Field(min_length=1)
    env: dict[str, str] = Field(default_factory=dict, max_length=MAX_ENVIRONMENT, repr=False)
    disk: int = Field(ge=1)
    args: str | None = None
    ports: tuple[str, ...] | None = None
    mounts: Mounts | None = None
    data_center_ids: tuple[str, ...] | None = None


class PodRequest(_ContainerRequest):
    """One machine. registry: the id of a credential, for a private image."""

    gpu: GpuRequest
    cloud: Cloud = "SECURE"
    registry: str | None = None


class ClusterCompute(RequestBody):
    gpu_type_id: str = Field(min_length=1)
    gpu_count_per_pod: int = Field(ge=1)
    pod_count: int = Field(ge=2)


class ClusterRequest(_ContainerRequest):
    """Several equal machines in one data center. There is no choice of cloud, CUDA or registry."""

    type: Literal["TRAINING"] = "TRAINING"
    compute: ClusterCompute


# --------------------------------------------------------------------------------------------------
# Answers


class Answer(BaseModel):
    """Base of what comes back."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        alias_generator=to_camel,
        populate_by_name=True,
        hide_input_in_errors=True,
    )


class PodGpu(Answer):
    id: str | None = None
    count: int | None = None


class PodPort(Answer):
    private: int | None = None
    public: int | None = None
    type: str | None = None
    ip: str | None = None


class GpuUtilisation(Answer):
    """Percent."""

    util: float | None = None
    memory_util: float | None = None


class PodRuntime(Answer):
    """What the running container does. uptime: seconds."""

    uptime: float | None = None
    gpus: tuple[GpuUtilisation, ...] | None = None
    ports: tuple[PodPort, ...] | None = None


class PodCluster(Answer):
    id: str
    rank: int | None = None
    ip: str | None = None


class Pod(Answer):
    """A machine. Its status may be a word that `PodStatus` does not have (yet).

    usd_per_h is what RunPod bills now; it has been seen above 0 on an EXITED pod.
    """

    id: str
    name: str = ""
    status: Annotated[PodStatus | str | None, Field(union_mode="left_to_right")] = None
    image: str | None = None
    args: str | None = None
    disk: int | None = None
    env: dict[str, str] | None = Field(default=None, repr=False)
    gpu: PodGpu | None = None
    cloud: str | None = None
    data_center_id: str | None = None
    cuda_version: str | None = None
    usd_per_h: float | None = Field(default=None, alias="cost")
    cluster: PodCluster | None = None
    runtime: PodRuntime | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None


class ClusterShape(Answer):
    gpu_type_id: str | None = None
    gpu_count_per_pod: int | None = None
    pod_count: int | None = None


class ClusterPods(Answer):
    total: int | None = None
    by_status: dict[str, int] | None = None


class ClusterPrimary(Answer):
    pod_id: str | None = None
    status: str | None = None


class Cluster(Answer):
    """Several machines that are created and deleted together."""

    id: str
    name: str = ""
    type: str | None = None
    compute: ClusterShape | None = None
    pods: ClusterPods | None = None
    primary: ClusterPrimary | None = None
    data_center_id: str | None = None
    created_at: datetime | None = None


class PerCloud(Answer):
    """A number for each cloud, and for workers of endpoints; None where the catalog has none."""

    secure: float | None = None
    community: float | None = None
    serverless: float | None = None

    def of(self, cloud: Cloud) -> float | None:
        return self.secure if cloud == "SECURE" else self.community


class DataCenterStock(Answer):
    id: str
    availability: Annotated[Stock | str, Field(union_mode="left_to_right")] = Stock.NONE


class CudaStock(Answer):
    version: str
    available: bool = False


class GpuType(Answer):
    """A line of the catalog. price: USD per hour of one GPU. memory: GB. max_count: of one machine. pool:
    what an endpoint calls it by, with others of its kind.

    availability, data_centers and cuda_versions are told for one cloud: `asked_cloud`, which the client
    notes here; availability None was not asked for.
    """

    id: str
    name: str = ""
    pool: str | None = None
    manufacturer: str | None = None
    memory: float = 0
    secure: bool = False
    community: bool = False
    price: PerCloud = PerCloud()
    max_count: PerCloud = PerCloud()
    availability: Annotated[Stock | str | None, Field(union_mode="left_to_right")] = None
    data_centers: tuple[DataCenterStock, ...] | None = None
    cuda_versions: tuple[CudaStock, ...] | None = None
    asked_cloud: Cloud = "SECURE"

    def offered_on(self, cloud: Cloud) -> bool:
        return self.secure if cloud == "SECURE" else self.community


class Secret(Answer):
    name: str


class Billing(Answer):
    """What something cost within a bucket of time, in USD."""

    start_time: datetime
    end_time: datetime
    total_usd: float = Field(alias="totalAmount")
    gpu_usd: float = Field(default=0.0, alias="gpuAmount")
    disk_usd: float = Field(default=0.0, alias="diskAmount")


class PodBilling(Billing):
    pod_id: str
    cpu_usd: float = Field(default=0.0, alias="cpuAmount")


class ClusterBilling(Billing):
    """All of a cluster's pods, and the network between them."""

    cluster_id: str
    networking_usd: float = Field(default=0.0, alias="networkingAmount")
