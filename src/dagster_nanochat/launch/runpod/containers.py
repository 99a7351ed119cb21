"""What a rented machine is asked for: its GPUs and disk, and what its containers are told.

A container learns where the store is, which job is its own, and every way by which its own key may end the
machine. Credentials it is told by the names of RunPod's secrets, never in plain words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings, disk_gb
from dagster_nanochat.launch.runpod.machines import machine_title
from dagster_nanochat.launch.runpod.models import (
    ClusterCompute,
    ClusterRequest,
    GpuRequest,
    Mounts,
    PersistentMount,
    PodRequest,
)
from dagster_nanochat.launch.runpod.offers import RunPodOffer
from nanochat import pod as in_pod
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import parameters
from nanochat.training.job import TrainingJob

STORE_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Of these, the ones that are set where the launcher runs.
_OTHER_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
# What a container needs to find the store, beside credentials.
_PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "HF_ENDPOINT")

# The network between a cluster's pods (runpod.md, section 3).
_CLUSTER_INTERFACE = {"NCCL_SOCKET_IFNAME": "ens1"}
GROUP_ENV = "NANOCHAT_GROUP"
# What a machine may need beyond its deadline: to start, and to end itself.
LIFETIME_MARGIN_S = 1800.0


def pod_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the secrets that a training container needs."""
    return (*STORE_SECRETS, *(name for name in _OTHER_SECRETS if environment.get(name)))


def missing_secrets(client: RunPodClient, names: Sequence[str]) -> list[str]:
    """Those of them that RunPod does not have; none where the key may not look. Raises RunPodError."""
    there = client.secrets()
    return [name for name in names if there is not None and name not in there]


def require_secrets(client: RunPodClient, names: Sequence[str]) -> None:
    """Raises AttemptFailed that names what RunPod does not have of them, and RunPodError."""
    missing = missing_secrets(client, names)
    if missing:
        raise AttemptFailed(
            Failure.BAD_REQUEST,
            f"RunPod has no secret {', '.join(missing)}: create it in RunPod's console (Settings, "
            "Secrets) under that name; pods are told no credential in plain words",
        )


def store_access(environment: Mapping[str, str], secrets: Sequence[str]) -> dict[str, str]:
    """The variables by which a container gets at the store that `environment` leads to."""
    return {
        **{name: environment[name] for name in _PASSED_ON if environment.get(name)},
        **{name: f"{{{{ RUNPOD_SECRET_{name} }}}}" for name in secrets},
    }


def machine_request(
    job: TrainingJob,
    offer: RunPodOffer,
    settings: RunPodSettings,
    *,
    store_url: str,
    api_url: str,
    environment: Mapping[str, str],
) -> PodRequest | ClusterRequest:
    """A cluster where the offer has several nodes. environment: that of the launcher."""
    shards_bytes = sum(file.size_bytes for file in job.shards)
    job_parameters = parameters(job.recipe.model, job.recipe.tokenizer.vocab_size)
    volume = settings.volume_disk_gb
    assert job.image is not None
    container: dict[str, Any] = {
        "name": machine_title(job.model, job.stage, job.token),
        "image": job.image,
        "env": _environment(job, settings, store_url, api_url, environment),
        "disk": settings.container_disk_gb or disk_gb(shards_bytes, job_parameters),
        "mounts": Mounts(persistent=PersistentMount(size=volume, path="/workspace")) if volume else None,
        "data_center_ids": offer.data_center_ids or None,
    }
    if offer.nodes > 1:
        compute = ClusterCompute(
            gpu_type_id=offer.gpu_type_id, gpu_count_per_pod=offer.gpu_count, pod_count=offer.nodes
        )
        return ClusterRequest(**container, compute=compute)
    ram = settings.min_ram_gib
    gpu = GpuRequest(
        id=offer.gpu_type_id,
        count=offer.gpu_count,
        min_cuda_version=settings.min_cuda_version,
        min_ram_per_gpu=None if ram is None else max(1, math.ceil(ram / offer.gpu_count)),
    )
    return PodRequest(**container, gpu=gpu, cloud=offer.cloud)


def _environment(
    job: TrainingJob,
    settings: RunPodSettings,
    store_url: str,
    api_url: str,
    environment: Mapping[str, str],
) -> dict[str, str]:
    several = job.hardware.nodes > 1
    return {
        **store_access(environment, pod_secrets(environment)),
        **(_CLUSTER_INTERFACE if several else {}),
        **settings.env_variables,
        in_pod.STORE_ENV: store_url,
        in_pod.JOB_ENV: f"{job.attempt_prefix}/job.json",
        in_pod.END_ENV: in_pod.encode_end(_end_requests(api_url, several)),
        in_pod.MACHINE_ENV: GROUP_ENV if several else "RUNPOD_POD_ID",
        in_pod.LIFETIME_ENV: f"{job.deadline_s + LIFETIME_MARGIN_S:.0f}",
    }


def _end_requests(api_url: str, several: bool) -> list[in_pod.EndRequest]:
    """Every way to the end that a pod's own key may be allowed. A member of a cluster first asks which
    cluster it is of; a pod that ends alone would leave the others to be paid for."""
    key = "RUNPOD_API_KEY"  # in a pod, a key that RunPod made for it alone
    pod, cluster = f"{api_url}/pods/${{RUNPOD_POD_ID}}", "CLUSTER_ID"
    its_cluster = [
        in_pod.EndRequest(method="GET", url=pod, bearer=key, learns={cluster: "cluster.id"}),
        in_pod.EndRequest(method="DELETE", url=f"{api_url}/clusters/${{{cluster}}}", bearer=key),
    ]
    return [
        *(its_cluster if several else []),
        in_pod.EndRequest(method="DELETE", url=pod, bearer=key),
        in_pod.EndRequest(method="POST", url=f"{pod}/action", body={"action": "terminate"}, bearer=key),
    ]
