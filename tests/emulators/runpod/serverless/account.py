"""The account's endpoints: making, changing and deleting them, within its quota of workers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from emulators.runpod.catalog import DATA_CENTERS, Catalog, Gpu
from emulators.runpod.faults import Fault, Faults
from emulators.runpod.logs import PodLogs
from emulators.runpod.problems import Problem, not_found
from emulators.runpod.serverless.endpoints import Endpoint, merged
from emulators.runpod.serverless.workers import Worker, WorkerTruth
from emulators.runpod.settings import Settings

_DEFAULT_WORKERS = {"min": 0, "max": 3, "idleTimeout": 10}
_DEFAULTS = {"timeout": 300_000, "flashboot": "OFF"}
_CLOUD = "SECURE"


class Platform(Protocol):
    """What is shared with pods."""

    settings: Settings
    catalog: Catalog
    faults: Faults

    def has_image(self, reference: str) -> bool: ...

    def container(
        self, id: str, request: Mapping[str, Any], folder: Path, own: Mapping[str, str]
    ) -> tuple[Sequence[str], Mapping[str, str]]: ...

    def remove_container(self, id: str, reference: str) -> None: ...

    def cut_off(self, id: str) -> None: ...

    def report(self, mistake: str) -> None: ...

    def check_container(self, request: Mapping[str, Any]) -> None: ...

    def new_id(self) -> str: ...


class Serverless:
    """jobs_url: what stands for https://api.runpod.ai/v2."""

    def __init__(self, platform: Platform, state_dir: Path) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.deleted: list[Endpoint] = []
        self.jobs_url = ""
        self.settings = platform.settings
        self._platform = platform
        self._state_dir = state_dir
        self._lock = threading.RLock()

    # -- what the routes ask for -------------------------------------------------------------------

    def create(self, body: dict[str, Any]) -> Endpoint:
        """Raises Problem."""
        request = {**_DEFAULTS, **body, "workers": {**_DEFAULT_WORKERS, **body.get("workers", {})}}
        if "templateId" in body:
            raise Problem(404, "template not found")
        if ("gpu" in request) == ("cpu" in request):
            raise Problem(400, "exactly one of gpu or cpu must be set")
        if _counts_requests(request) and "idleTimeout" in body.get("workers", {}):
            raise _no_idle_timeout()
        with self._lock:
            self._check(request, None)
            id = self._platform.new_id()
            endpoint = Endpoint(
                self,
                self._platform.faults,
                id=id,
                request=request,
                folder=self._state_dir / "serverless" / id,
                urls=self._urls(id, request["type"]),
            )
            self.endpoints[id] = endpoint
        endpoint.launch()
        return endpoint

    def endpoint(self, id: str) -> Endpoint:
        endpoint = self.endpoints.get(id)
        if endpoint is None:
            raise not_found("endpoint")
        return endpoint

    def update(self, id: str, changes: dict[str, Any]) -> Endpoint:
        """Raises Problem."""
        with self._lock:
            endpoint = self.endpoint(id)
            if "templateId" in changes:
                raise Problem(404, "template not found")
            other = {"gpu": "cpu", "cpu": "gpu"}
            if any(name in changes and other[name] in endpoint.request for name in other):
                raise Problem(400, "an endpoint's compute family cannot be changed")
            request = merged(endpoint.request, changes)
            if _counts_requests(request) and "idleTimeout" in changes.get("workers", {}):
                raise _no_idle_timeout()
            self._check(request, endpoint)
            endpoint.update(request)
        return endpoint

    def delete(self, id: str) -> None:
        """Its jobs are cancelled, its workers ended."""
        with self._lock:
            endpoint = self.endpoint(id)
            del self.endpoints[id]
            self.deleted.append(endpoint)
        endpoint.jobs.purge()
        threading.Thread(target=endpoint.close, name=f"delete-{id}").start()

    def close(self) -> None:
        with self._lock:
            endpoints = [*self.endpoints.values(), *self.deleted]
        for endpoint in endpoints:
            endpoint.close()

    def all(self) -> list[Endpoint]:
        """Every endpoint there ever was."""
        return [*self.deleted, *self.endpoints.values()]

    def truths(self) -> list[WorkerTruth]:
        """Every worker there ever was."""
        return [truth for endpoint in self.all() for truth in endpoint.truths()]

    def worker(self, id: str) -> Worker | None:
        found = (worker for endpoint in self.all() for worker in endpoint.workers() if worker.id == id)
        return next(found, None)

    def logs(self, id: str) -> PodLogs | None:
        """Of a worker, also of one that is gone."""
        found = (worker.logs for endpoint in self.all() for worker in endpoint.ever() if worker.id == id)
        return next(found, None)

    def spent_usd(self) -> float:
        return sum(sum(endpoint.charged_usd()) for endpoint in self.all())

    # -- what workers ask (see workers.Host) -------------------------------------------------------

    def has_image(self, reference: str) -> bool:
        return self._platform.has_image(reference)

    def container(
        self, id: str, request: Mapping[str, Any], folder: Path, own: Mapping[str, str]
    ) -> tuple[Sequence[str], Mapping[str, str]]:
        return self._platform.container(id, request, folder, own)

    def remove_container(self, id: str, reference: str) -> None:
        self._platform.remove_container(id, reference)

    def cut_off(self, id: str) -> None:
        self._platform.cut_off(id)

    def report(self, mistake: str) -> None:
        self._platform.report(mistake)

    def place(self, request: Mapping[str, Any]) -> tuple[Gpu | None, str] | None:
        places = [place for place in request.get("dataCenterIds") or DATA_CENTERS if place in DATA_CENTERS]
        if "gpu" not in request:
            return (None, places[0]) if places else None
        count = request["gpu"].get("count", 1)
        with self._lock:
            for gpu in self._gpus(request):
                for place in places:
                    free = self._platform.catalog.free(gpu.id, place, _CLOUD)
                    if free is None or free >= count:
                        self._platform.catalog.take(gpu.id, place, _CLOUD, count)
                        return gpu, place
        return None

    def give_back(self, request: Mapping[str, Any], gpu: Gpu | None, data_center: str) -> None:
        if gpu is not None:
            with self._lock:
                self._platform.catalog.take(gpu.id, data_center, _CLOUD, -request["gpu"].get("count", 1))

    def worker_environment(self, worker: Worker) -> Mapping[str, str]:
        """What the platform puts over everything else: where the SDK asks for jobs and tells results."""
        base = f"{self.jobs_url}/{worker.endpoint}"
        gpu = worker.gpu.id if worker.gpu else ""
        return {
            "PORT": str(worker.port),
            "PORT_HEALTH": str(worker.port),
            "RUNPOD_POD_ID": worker.id,
            "RUNPOD_ENDPOINT_ID": worker.endpoint,
            "RUNPOD_AI_API_KEY": worker.key,
            "RUNPOD_POD_HOSTNAME": f"{worker.id}-64411eb2",
            "RUNPOD_DC_ID": worker.data_center or "",
            "RUNPOD_GPU_COUNT": str(worker.request.get("gpu", {"count": 0}).get("count", 1)),
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu={gpu.replace(' ', '+')}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu={gpu.replace(' ', '+')}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu={gpu.replace(' ', '+')}",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": str(round(self.settings.ping_interval_s * 1000)),
            # This machine has not what the SDK's own checks look for.
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        }

    # ----------------------------------------------------------------------------------------------

    def suffer(self, fault: Fault) -> bool:
        """A fault of a worker that exists strikes it; False where there is none of that id."""
        worker = self.worker(fault.pod)
        if worker is not None:
            worker.suffer(fault)
        return worker is not None

    def _gpus(self, request: Mapping[str, Any]) -> list[Gpu]:
        gpu = request["gpu"]
        excluded = gpu.get("excludedTypes", [])
        return [
            found
            for pool in gpu["pools"]
            for found in self._platform.catalog.gpus.values()
            if found.pool == pool and found.id not in excluded
        ]

    def _check(self, request: Mapping[str, Any], endpoint: Endpoint | None) -> None:
        self._platform.check_container(request)
        scale = request["workers"]
        if scale["min"] > scale["max"]:
            raise Problem(400, "workers.min must not exceed workers.max")
        if "gpu" in request:
            known = {gpu.pool for gpu in self._platform.catalog.gpus.values()}
            for pool in request["gpu"]["pools"]:
                if pool not in known:
                    raise Problem(400, f"gpu pool {pool} does not exist")
            if not self._gpus(request):
                raise Problem(400, "the selection of GPUs is empty")
        elsewhere = sum(
            other.request["workers"]["max"] for other in self.endpoints.values() if other is not endpoint
        )
        quota = self.settings.worker_quota
        if elsewhere + scale["max"] > quota:
            raise Problem(
                400,
                f"Max workers across all endpoints must not exceed your workers quota ({quota}). Reduce the "
                "max workers for other endpoints or lower the max worker count for this endpoint to at most "
                f"{max(0, quota - elsewhere)}.",
            )

    def _urls(self, id: str, kind: str) -> dict[str, str]:
        base = f"{self.jobs_url}/{id}"
        if kind == "LOAD_BALANCER":
            balanced = base.replace("/v2/", "/balanced/")
            return {"base": balanced, "health": f"{balanced}/ping"}
        return {
            "run": f"{base}/run",
            "runSync": f"{base}/runsync",
            "status": f"{base}/status/{{job_id}}",
            "stream": f"{base}/stream/{{job_id}}",
            "cancel": f"{base}/cancel/{{job_id}}",
            "retry": f"{base}/retry/{{job_id}}",
            "purgeQueue": f"{base}/purge-queue",
            "health": f"{base}/health",
        }


def _counts_requests(request: Mapping[str, Any]) -> bool:
    return bool(request["type"] == "QUEUE" and request["scaling"]["type"] == "REQUEST_COUNT")


def _no_idle_timeout() -> Problem:
    return Problem(
        422,
        "Request validation failed.",
        errors=["$.workers.idleTimeout: does not apply to a queue endpoint that scales on requestCount"],
    )
