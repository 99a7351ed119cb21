"""The account and what it rents: placing pods and clusters, keys, secrets, who may touch what."""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emulators.runpod import buildah
from emulators.runpod.catalog import DATA_CENTERS, Catalog, Gpu, cuda_version
from emulators.runpod.environment import (
    base_environment,
    command_line,
    platform_environment,
    with_secrets,
)
from emulators.runpod.faults import POD_KINDS, Fault, Faults
from emulators.runpod.logs import timestamp
from emulators.runpod.pods import ACTIONS, Membership, Placement, Pod
from emulators.runpod.ports import free_port
from emulators.runpod.problems import NO_CAPACITY, Problem, not_found
from emulators.runpod.processes import StartFailed
from emulators.runpod.serverless.account import Serverless
from emulators.runpod.settings import Image, Settings
from standins.s3_faults import S3FaultProxy

_MOST_ENV = 50
_CPU_USD_PER_VCPU_H = 0.04
_ID_LETTERS = "abcdefghijkmnpqrstuvwxyz0123456789"


@dataclasses.dataclass(kw_only=True)
class Cluster:
    id: str
    name: str
    request: dict[str, Any]
    data_center: str
    pods: list[Pod]
    created_at: datetime.datetime

    def document(self) -> dict[str, Any]:
        by_status: dict[str, int] = {}
        for pod in self.pods:
            by_status[pod.status] = by_status.get(pod.status, 0) + 1
        return {
            "id": self.id,
            "name": self.name,
            "type": self.request["type"],
            "compute": self.request["compute"],
            "dataCenterId": self.data_center,
            "pods": {"total": len(self.pods), "byStatus": by_status},
            "network": {"cidr": "127.0.0.0/24"},
            "primary": {"podId": self.pods[0].id, "status": self.pods[0].status},
            "createdAt": timestamp(self.created_at),
        }


class Platform:
    """Everything the routes answer from."""

    def __init__(
        self,
        *,
        images: Mapping[str, Image],
        state_dir: Path,
        settings: Settings,
        network: S3FaultProxy | None,
    ) -> None:
        self.settings = settings
        self.catalog = Catalog()
        self.faults = Faults()
        self.images = dict(images)
        self.api_key = f"rpa_{secrets.token_hex(16).upper()}"
        self.api_url = ""
        self.secrets: dict[str, dict[str, str]] = {}
        self.registries: dict[str, str] = {}
        self.pods: dict[str, Pod] = {}
        self.clusters: dict[str, Cluster] = {}
        self.mistakes: list[str] = []
        self.network = network
        self.serverless = Serverless(self, state_dir)
        self._state_dir = state_dir
        self._lock = threading.RLock()

    # -- pods --------------------------------------------------------------------------------------

    def create_pod(self, request: dict[str, Any]) -> Pod:
        """Raises Problem."""
        self.check_container(request)
        if ("gpu" in request) == ("cpu" in request):
            raise Problem(400, "exactly one of gpu or cpu must be set")
        with self._lock:
            placement = self._place_gpu(request) if "gpu" in request else self._place_cpu(request)
            pod = self._make_pod(request, placement)
        pod.launch()
        return pod

    def pod(self, id: str) -> Pod:
        pod = self.pods.get(id)
        if pod is None or not pod.is_there:
            raise not_found("pod")
        return pod

    def standalone_pod(self, id: str) -> Pod:
        """A pod that may be changed by itself: no member of a cluster."""
        pod = self.pod(id)
        if pod.membership is not None:
            raise Problem(409, f"pod belongs to cluster {pod.membership.cluster}; manage it there")
        return pod

    def present_pods(self, *, members: bool) -> list[Pod]:
        with self._lock:
            pods = [pod for pod in self.pods.values() if pod.is_there]
        return [pod for pod in pods if members or pod.membership is None]

    def act(self, pod: Pod, action: str) -> None:
        if action not in ACTIONS[pod.status]:
            raise Problem(409, f"action {action} is not valid for a pod that is {pod.status}")
        if pod.locked and action in ("stop", "restart"):
            raise Problem(409, "pod is locked")
        if action == "terminate":
            self.delete(pod)
        else:
            {"start": pod.start, "stop": pod.stop, "restart": pod.restart}[action]()

    def delete(self, pod: Pod) -> None:
        lingers = self.faults.take("lingers", pod=pod.id) or self.faults.take(
            "lingers", pod=pod.request["name"]
        )
        if lingers:
            pod.terminate_later(lingers.seconds)
        else:
            pod.terminate()

    def update(self, pod: Pod, changes: dict[str, Any]) -> None:
        merged = {**pod.request, **{name: value for name, value in changes.items() if name != "locked"}}
        self.check_container(merged)
        pod.locked = changes.get("locked", pod.locked)
        pod.request = merged
        if set(changes) - {"name", "locked", "globalNetworking"}:
            pod.reset()

    # -- clusters ----------------------------------------------------------------------------------

    def create_cluster(self, request: dict[str, Any]) -> Cluster:
        """All members in one data center. Raises Problem."""
        self.check_container(request)
        compute = request["compute"]
        size, gpus = compute["podCount"], compute["gpuCountPerPod"]
        wanted = {
            **{name: value for name, value in request.items() if name not in ("compute", "type")},
            "gpu": {"id": compute["gpuTypeId"], "count": gpus},
        }
        with self._lock:
            placement = self._place_gpu(wanted, machines=size)
            id = self.new_id()
            port = free_port()
            pods = [
                self._make_pod(
                    {**wanted, "name": f"{request['name']}-{rank}"},
                    placement,
                    Membership(
                        cluster=id,
                        rank=rank,
                        ip=_member_ip(rank),
                        environment=_rank_environment(rank, size=size, gpus=gpus, port=port),
                    ),
                )
                for rank in range(size)
            ]
            cluster = Cluster(
                id=id,
                name=request["name"],
                request=request,
                data_center=placement.data_center,
                pods=pods,
                created_at=datetime.datetime.now(datetime.UTC),
            )
            self.clusters[id] = cluster
        for pod in pods:
            pod.launch()
        return cluster

    def cluster(self, id: str) -> Cluster:
        cluster = self.clusters.get(id)
        if cluster is None:
            raise not_found("cluster")
        return cluster

    def delete_cluster(self, id: str) -> None:
        cluster = self.cluster(id)
        del self.clusters[id]
        for pod in cluster.pods:
            if pod.is_there:
                self.delete(pod)

    # -- what pods ask -----------------------------------------------------------------------------

    def has_image(self, reference: str) -> bool:
        return self._image(reference) is not None

    def pod_container(self, pod: Pod) -> tuple[Sequence[str], Mapping[str, str]]:
        return self.container(pod.id, pod.request, pod.container_folder, platform_environment(pod))

    def container(
        self, id: str, request: Mapping[str, Any], folder: Path, own: Mapping[str, str]
    ) -> tuple[Sequence[str], Mapping[str, str]]:
        """How the container of pod or worker `id` is started. own: what the platform puts over everything
        else in its environment. Raises StartFailed."""
        image = self._image(request["image"])
        if image is None:
            raise StartFailed(f"no such image: {request['image']}")
        args = request.get("args", "")
        environment = self._environment(id, request, image, own)
        if image.buildah is None:
            command = command_line(image.entrypoint, image.command, args)
            return command, {**base_environment(folder), **environment}
        return buildah.command(id, image.buildah, args, environment), os.environ

    def _environment(
        self, id: str, request: Mapping[str, Any], image: Image, own: Mapping[str, str]
    ) -> dict[str, str]:
        """What the image does not bring itself."""
        values = {name: secret["value"] for name, secret in self.secrets.items()}
        asked = with_secrets(request.get("env", {}), values)
        if self.network is not None:
            # A way of its own to the store, so that it alone can be cut off.
            store = f"http://127.0.0.1:{self.network.port_for(id)}"
            asked = {
                name: store if value.rstrip("/") == self.network.url else value
                for name, value in asked.items()
            }
        return {"RUNPOD_API_URL": self.api_url, **image.environment, **asked, **own}

    def cut_off(self, id: str) -> None:
        assert self.network is not None
        self.network.block(id)

    def wipe(self, pod: Pod) -> None:
        shutil.rmtree(pod.container_folder)
        self.remove_container(pod.id, pod.request["image"])

    def report(self, mistake: str) -> None:
        self.mistakes.append(mistake)

    def gone(self, pod: Pod) -> None:
        """Its folder stays, for who wants to see."""
        place = pod.placement
        if place.gpu is not None:
            with self._lock:
                self.catalog.take(place.gpu.id, place.data_center, place.cloud, -place.count)
        self.remove_container(pod.id, pod.request["image"])

    # -- keys, secrets, faults, the end ---------------------------------------------------------------------

    def owner(self, key: str | None) -> str | None:
        """`account`, the id of the pod whose key it is, or None for a key that nobody has."""
        if key == self.api_key:
            return "account"
        return next((pod.id for pod in self.pods.values() if pod.api_key == key), None)

    def is_own(self, pod: str, id: str | None) -> bool:
        """Whether the thing of that id is the pod's own to end."""
        membership = self.pods[pod].membership
        its_cluster = membership.cluster if membership and self.settings.members_end_clusters else None
        return id in (pod, its_cluster) and id is not None

    def set_secret(self, name: str, value: str, description: str = "") -> dict[str, str]:
        """Make a secret, or give one another value."""
        kept = self.secrets.get(name) or {
            "id": self.new_id(),
            "createdAt": timestamp(datetime.datetime.now(datetime.UTC)),
        }
        self.secrets[name] = {**kept, "value": value, "description": description}
        return self.secrets[name]

    def fault(self, fault: Fault) -> str:
        """Order a fault. One of a pod that exists strikes without waiting for a request; returns its id.
        Raises ValueError where there is no network to lose."""
        if fault.kind == "network" and self.network is None:
            raise ValueError("the emulator was started without an S3 proxy: nothing can be cut off")
        pod = self.pods.get(fault.pod)
        id = self.faults.add(fault.kind, **fault.model_dump(exclude={"kind"}))
        if pod is not None and fault.kind in POD_KINDS:
            self.faults.use(id)
            pod.suffer(fault)
        elif fault.kind in (*POD_KINDS, "throttled") and self.serverless.suffer(fault):
            self.faults.use(id)
        return id

    def close(self) -> None:
        with self._lock:
            pods = [pod for pod in self.pods.values() if pod.is_there]
        _each_on_a_thread([self.serverless.close, *(pod.close for pod in pods)])

    def remove_container(self, id: str, reference: str) -> None:
        image = self._image(reference)
        if image is not None and image.buildah is not None:
            buildah.remove(id)

    # -- placing -----------------------------------------------------------------------------------

    def _image(self, reference: str) -> Image | None:
        return next(
            (image for pattern, image in self.images.items() if fnmatch.fnmatchcase(reference, pattern)), None
        )

    def check_container(self, request: Mapping[str, Any]) -> None:
        if len(request.get("env", {})) > _MOST_ENV:
            raise Problem(400, f"at most {_MOST_ENV} environment variables are allowed")
        mounts = request.get("mounts", {})
        if "persistent" in mounts and ("network" in mounts or "cpu" in request):
            raise Problem(400, "mounts.persistent excludes mounts.network and CPU pods")
        gpu = request.get("gpu", {})
        if "allowedCudaVersions" in gpu and "minCudaVersion" in gpu:
            raise Problem(400, "gpu.allowedCudaVersions and gpu.minCudaVersion exclude each other")
        registry = request.get("registry")
        if registry is not None and registry not in self.registries:
            raise not_found("registry")
        args = request.get("args", "")
        if args.lstrip().startswith("{"):
            try:
                json.loads(args)
            except ValueError as error:
                raise Problem(400, f"args is neither a command nor JSON: {error}") from error

    def _place_gpu(self, request: Mapping[str, Any], *, machines: int = 1) -> Placement:
        wanted = request["gpu"]
        gpu = self.catalog.gpus.get(wanted["id"])
        if gpu is None:
            raise Problem(400, f"gpu type {wanted['id']} does not exist")
        count = wanted.get("count", 1)
        if count > gpu.max_count:
            raise Problem(400, f"at most {gpu.max_count} GPUs of type {gpu.id} fit on one pod")
        cloud = request.get("cloud", "SECURE")
        price = gpu.price(cloud)
        version = cuda_version(gpu, wanted)
        places = [
            place
            for place in request.get("dataCenterIds") or DATA_CENTERS
            if place in DATA_CENTERS and self._has_room(gpu, place, cloud, count * machines)
        ]
        if price is None or version is None or not places:
            raise Problem(400, NO_CAPACITY)
        choices = [{"gpu": gpu.id, "data_center": place, "cloud": cloud} for place in places]
        met = self.faults.take_for_all("no_capacity", choices=choices)
        data_center = next((place for place, fault in zip(places, met, strict=True) if fault is None), None)
        if data_center is None:
            raise Problem(400, NO_CAPACITY)
        self._check_balance(price * count * machines)
        for _ in range(machines):
            self.catalog.take(gpu.id, data_center, cloud, count)
        return Placement(
            gpu=gpu,
            count=count,
            cloud=cloud,
            data_center=data_center,
            cuda_version=version,
            price_usd_per_h=price * count,
        )

    def _place_cpu(self, request: Mapping[str, Any]) -> Placement:
        price = request["cpu"]["vcpuCount"] * _CPU_USD_PER_VCPU_H
        self._check_balance(price)
        places = [place for place in request.get("dataCenterIds") or DATA_CENTERS if place in DATA_CENTERS]
        if not places:
            raise Problem(400, NO_CAPACITY)
        return Placement(
            gpu=None,
            count=0,
            cloud=request.get("cloud", "SECURE"),
            data_center=places[0],
            cuda_version=None,
            price_usd_per_h=price,
        )

    def _has_room(self, gpu: Gpu, place: str, cloud: str, count: int) -> bool:
        free = self.catalog.free(gpu.id, place, cloud)
        return free is None or free >= count

    def _check_balance(self, price_usd_per_h: float) -> None:
        """An hour has to be in hand, as on the real platform."""
        if self.settings.balance_usd is None:
            return
        spent = sum(pod.hours() * pod.placement.price_usd_per_h for pod in self.pods.values())
        spent += self.serverless.spent_usd()
        if self.settings.balance_usd - spent < price_usd_per_h:
            raise Problem(402, "insufficient balance")

    def _make_pod(
        self, request: dict[str, Any], placement: Placement, membership: Membership | None = None
    ) -> Pod:
        id = self.new_id()
        gpu = placement.gpu.id if placement.gpu else ""
        pod = Pod(
            self,
            id=id,
            api_key=f"rpa_{secrets.token_hex(16).upper()}",
            request=request,
            placement=placement,
            folder=self._state_dir / "pods" / id,
            membership=membership,
            faults=self.faults.take_every(*POD_KINDS, gpu=gpu, pod=request["name"]),
        )
        self.pods[id] = pod
        return pod

    def new_id(self) -> str:
        return "".join(secrets.choice(_ID_LETTERS) for _ in range(14))


def _member_ip(rank: int) -> str:
    return f"127.0.0.{rank + 1}"


def _rank_environment(rank: int, *, size: int, gpus: int, port: int) -> dict[str, str]:
    master = _member_ip(0)
    return {
        "MASTER_ADDR": master,
        "PRIMARY_ADDR": master,
        "MASTER_PORT": str(port),
        "PRIMARY_PORT": str(port),
        "NODE_ADDR": _member_ip(rank),
        "NODE_RANK": str(rank),
        "NUM_NODES": str(size),
        "NUM_TRAINERS": str(gpus),
        "HOST_NODE_ADDR": f"{master}:{port}",
        "WORLD_SIZE": str(size * gpus),
    }


def _each_on_a_thread(calls: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
