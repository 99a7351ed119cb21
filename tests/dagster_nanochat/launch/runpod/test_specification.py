"""What the client sends is what RunPod's specification asks for, and it reads what is specified."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from standins.runpod_api import Specification

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.endpoint_models import (
    Endpoint,
    EndpointChange,
    EndpointGpu,
    EndpointRequest,
    QueueDelay,
    WorkerLimits,
)
from dagster_nanochat.launch.runpod.errors import RunPodError, problem_of, refusal
from dagster_nanochat.launch.runpod.models import (
    Cluster,
    ClusterCompute,
    ClusterRequest,
    GpuRequest,
    GpuType,
    Mounts,
    PersistentMount,
    Pod,
    PodBilling,
    PodRequest,
    PodStatus,
    Stock,
)

POD = PodRequest(
    name="dg-run-token",
    image="ghcr.io/someone/nanochat@sha256:00",
    env={"NANOCHAT_STORE": "s3://bucket/store"},
    disk=50,
    args="--store s3://bucket/store",
    ports=("22/tcp",),
    mounts=Mounts(persistent=PersistentMount(size=20, path="/workspace")),
    data_center_ids=("US-KS-2",),
    gpu=GpuRequest(id="NVIDIA H100 80GB HBM3", count=8, min_cuda_version="12.8"),
    cloud="COMMUNITY",
    registry="reg1",
)
CLUSTER = ClusterRequest(
    name="dg-run-token",
    image="ghcr.io/someone/nanochat@sha256:00",
    env={"A": "b"},
    disk=50,
    args="train",
    compute=ClusterCompute(gpu_type_id="NVIDIA H100 80GB HBM3", gpu_count_per_pod=8, pod_count=2),
)
ENDPOINT = EndpointRequest(
    name="nanochat-d4",
    image="ghcr.io/someone/nanochat@sha256:00",
    env={"A": "b"},
    disk=20,
    gpu=EndpointGpu(pools=("ADA_24", "AMPERE_24"), min_cuda_version="13.0"),
    workers=WorkerLimits(min=0, max=2, idle_timeout=60),
    scaling=QueueDelay(queue_delay=4),
    timeout=300_000,
    data_center_ids=("US-KS-2",),
)
CLUSTER_ANSWER = {
    "id": "cluster_1",
    "name": "dg-run-token",
    "type": "TRAINING",
    "compute": {"gpuTypeId": "NVIDIA H100 80GB HBM3", "gpuCountPerPod": 8, "podCount": 2},
    "pods": {"total": 2, "byStatus": {"RUNNING": 1, "STARTING": 1}},
    "network": {"cidr": "10.65.0.0/16"},
    "primary": {"podId": "pod_0", "status": "RUNNING"},
    "dataCenterId": "US-TX-3",
    "createdAt": "2026-06-29T20:00:00Z",
}
START, END = datetime(2026, 6, 1, tzinfo=UTC), datetime(2026, 6, 2, tzinfo=UTC)

CALLS: list[tuple[str, Callable[[RunPodClient], Any]]] = [
    ("POST /v2/pods", lambda client: client.create_pod(POD)),
    (
        "POST /v2/pods",
        lambda client: client.create_pod(PodRequest(name="n", image="i", disk=1, gpu=GpuRequest(id="g"))),
    ),
    ("GET /v2/pods/{id}", lambda client: client.get_pod("7h9k2m4n6p")),
    ("GET /v2/pods", lambda client: client.list_pods()),
    ("GET /v2/pods", lambda client: client.list_pods(include_cluster_pods=True)),
    ("DELETE /v2/pods/{id}", lambda client: client.delete_pod("7h9k2m4n6p")),
    ("POST /v2/pods/{id}/action", lambda client: client.terminate("7h9k2m4n6p")),
    ("GET /v2/pods/{id}/logs", lambda client: client.pod_logs("7h9k2m4n6p", source="system", tail=5)),
    ("GET /v2/pods/{id}/logs", lambda client: client.pod_logs("7h9k2m4n6p")),
    ("POST /v2/clusters", lambda client: client.create_cluster(CLUSTER)),
    ("GET /v2/clusters", lambda client: client.list_clusters()),
    ("GET /v2/clusters/{id}", lambda client: client.get_cluster("cluster_1")),
    ("GET /v2/clusters/{id}/pods", lambda client: client.cluster_pods("cluster_1")),
    ("DELETE /v2/clusters/{id}", lambda client: client.delete_cluster("cluster_1")),
    (
        "GET /v2/catalog/gpus",
        lambda client: client.gpu_types("CLUSTER", cloud="COMMUNITY", count=8, min_cuda_version="12.8"),
    ),
    ("GET /v2/catalog/gpus", lambda client: client.gpu_types(with_availability=False)),
    ("GET /v2/billing/pods", lambda client: client.billing_pods(START, END, bucket="day", pod_id="p")),
    (
        "GET /v2/billing/clusters",
        lambda client: client.billing_clusters(START, END, bucket="day", cluster_id="c"),
    ),
    ("POST /v2/serverless", lambda client: client.create_endpoint(ENDPOINT)),
    ("PATCH /v2/serverless/{id}", lambda client: client.update_endpoint("e", ENDPOINT.as_change())),
    (
        "PATCH /v2/serverless/{id}",
        lambda client: client.update_endpoint("e", EndpointChange(workers=WorkerLimits(min=0, max=0))),
    ),
    ("GET /v2/serverless/{id}", lambda client: client.get_endpoint("e")),
    ("GET /v2/serverless", lambda client: client.list_endpoints()),
    ("GET /v2/serverless/{id}/workers", lambda client: client.endpoint_workers("e")),
    ("GET /v2/serverless/{id}/releases", lambda client: client.endpoint_releases("e")),
    ("DELETE /v2/serverless/{id}", lambda client: client.delete_endpoint("e")),
    ("GET /v2/billing/serverless", lambda client: client.billing_serverless(START, END)),
    ("GET /v2/account/secrets", lambda client: client.secrets()),
]


def _answer(specification: Specification, request: httpx.Request, what: str) -> httpx.Response:
    method, template = what.split()
    if template == "/v2/account/secrets":
        return httpx.Response(200, json={"secrets": [{"id": "s1", "name": "hf_token"}]})
    if template.endswith("/logs"):
        return httpx.Response(200, text='id: 1\ndata: {"line":"Model loaded."}\n\n')
    if method == "DELETE" or template.endswith("/action"):
        return httpx.Response(204)
    if template == "/v2/clusters" and method == "GET":
        return httpx.Response(200, json={"clusters": [CLUSTER_ANSWER]})
    if template == "/v2/clusters/{id}/pods":
        template = "/v2/pods"
    elif template.startswith("/v2/clusters"):
        return httpx.Response(201 if method == "POST" else 200, json=CLUSTER_ANSWER)
    status = 201 if method == "POST" else 200
    return httpx.Response(status, json=specification.examples(template, method.lower())[status][0])


@pytest.mark.parametrize(("what", "call"), CALLS)
def test_every_request_is_as_specified_and_its_example_is_understood(
    what: str,
    call: Callable[[RunPodClient], Any],
    specification: Specification,
    client_of: Callable[..., RunPodClient],
) -> None:
    sent = []

    def handle(request: httpx.Request) -> httpx.Response:
        sent.append(specification.check(request))
        return _answer(specification, request, sent[-1])

    answer = call(client_of(handle))
    assert sent == [what]
    if not what.startswith("DELETE") and not what.endswith("/action"):
        assert answer


def test_the_judge_finds_an_unknown_field_and_a_missing_one(specification: Specification) -> None:
    body = POD.body()
    assert specification.schema_errors("CreatePodRequest", body) == []
    assert specification.schema_errors("CreatePodRequest", {**body, "dataCenterId": "US-KS-2"})
    assert specification.schema_errors("CreatePodRequest", {**body, "gpu": {"count": 1}})


def test_main_memory_is_the_one_field_that_the_specification_at_hand_has_not(
    specification: Specification,
) -> None:
    gpu = GpuRequest(id="NVIDIA L4", min_ram_per_gpu=64)
    body = PodRequest(name="n", image="i", disk=1, gpu=gpu).body()
    assert "minRamPerGpu" in str(specification.schema_errors("CreatePodRequest", body))
    assert body["gpu"].pop("minRamPerGpu") == 64
    assert specification.schema_errors("CreatePodRequest", body) == []


MODELS: list[tuple[str, str, str | None, type[Any]]] = [
    ("/v2/pods", "get", "pods", Pod),
    ("/v2/pods", "post", None, Pod),
    ("/v2/pods/{id}", "get", None, Pod),
    ("/v2/pods/{id}/action", "post", None, Pod),
    ("/v2/catalog/gpus", "get", "gpus", GpuType),
    ("/v2/billing/pods", "get", "records", PodBilling),
    ("/v2/serverless", "get", "endpoints", Endpoint),
    ("/v2/serverless", "post", None, Endpoint),
    ("/v2/serverless/{id}", "patch", None, Endpoint),
]


@pytest.mark.parametrize(("template", "method", "key", "model"), MODELS)
def test_every_example_of_an_answer_is_read(
    template: str, method: str, key: str | None, model: type[Any], specification: Specification
) -> None:
    examples = specification.examples(template, method)
    good = [example for status, listed in examples.items() if status < 300 for example in listed]
    assert good
    for example in good:
        for document in example[key] if key else [example]:
            read = model.model_validate(document)
            assert read.model_dump(mode="json", by_alias=True, exclude_none=True)
    for status, listed in examples.items():
        for example in listed if status >= 400 else ():
            error = refusal("GET", problem_of(status, example, "", {}))
            assert (error.status, error.title, error.detail) == (
                status,
                example["title"],
                example["detail"],
            )
            assert type(error) is not RunPodError


def test_an_example_is_read_to_the_values_it_has(specification: Specification) -> None:
    example = specification.examples("/v2/pods/{id}", "get")[200][0]
    pod = Pod.model_validate(example)
    assert (pod.id, pod.status, pod.usd_per_h) == ("7h9k2m4n6p", PodStatus.RUNNING, 0.44)
    assert pod.gpu is not None
    assert (pod.gpu.id, pod.gpu.count) == ("NVIDIA GeForce RTX 4090", 1)
    assert pod.runtime is not None
    assert pod.runtime.ports is not None
    assert (pod.runtime.uptime, pod.runtime.ports[0].public) == (3600, 34446)
    assert pod.started_at == datetime(2026, 6, 1, 12, 2, tzinfo=UTC)
    line = GpuType.model_validate(specification.examples("/v2/catalog/gpus", "get")[200][0]["gpus"][0])
    assert (line.price.of("COMMUNITY"), line.max_count.of("SECURE"), line.availability) == (
        0.31,
        8,
        Stock.HIGH,
    )
    bill = specification.examples("/v2/billing/pods", "get")[200][0]["records"][0]
    assert PodBilling.model_validate(bill).total_usd == 12.34


def test_a_cluster_is_read(specification: Specification) -> None:
    assert specification.schema_errors("Cluster", CLUSTER_ANSWER) == []
    cluster = Cluster.model_validate(CLUSTER_ANSWER)
    assert cluster.pods is not None
    assert cluster.pods.by_status == {"RUNNING": 1, "STARTING": 1}
    assert cluster.primary is not None
    assert cluster.primary.pod_id == "pod_0"
    member = {"id": "p1", "cluster": {"id": "cluster_1", "rank": None}}
    pod = Pod.model_validate(member)
    assert pod.cluster is not None
    assert (pod.cluster.id, pod.cluster.rank) == ("cluster_1", None)


def test_fields_that_may_be_null_or_new_do_not_hide_a_machine() -> None:
    nulls = dict.fromkeys(
        ("cloud", "dataCenterId", "cudaVersion", "runtime", "startedAt", "gpu", "env", "cost", "status")
    )
    assert Pod.model_validate({"id": "p", **nulls}).status is None
    assert Pod.model_validate({"id": "p", "status": "MIGRATING", "zone": {"of": 1}}).status == "MIGRATING"


def test_an_environment_is_never_shown() -> None:
    secret = "wJalrXUtnFEMI"
    request = PodRequest(
        name="n", image="i", disk=1, gpu=GpuRequest(id="g"), env={"AWS_SECRET_ACCESS_KEY": secret}
    )
    assert secret not in repr(request)
    assert request.body()["env"] == {"AWS_SECRET_ACCESS_KEY": secret}
    assert secret not in repr(Pod.model_validate({"id": "p", "env": {"A": secret}}))
    with pytest.raises(ValueError) as caught:
        PodRequest(name="n", image="i", disk=0, gpu=GpuRequest(id="g"), env={"A": secret, "B": 1})  # type: ignore[dict-item]
    assert "disk" in str(caught.value)
    assert secret not in str(caught.value)


def test_more_variables_than_runpod_takes_are_refused_before_it_is_asked() -> None:
    with pytest.raises(ValueError, match="at most 50"):
        PodRequest(name="n", image="i", disk=1, gpu=GpuRequest(id="g"), env={f"V{n}": "" for n in range(51)})
