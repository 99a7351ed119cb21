"""Endpoints: configuration, releases, and how many workers there are at a time."""

from __future__ import annotations

import dataclasses
import datetime
import math
import secrets
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emulators.runpod.catalog import Gpu
from emulators.runpod.faults import POD_KINDS, Faults
from emulators.runpod.logs import timestamp
from emulators.runpod.problems import not_found
from emulators.runpod.serverless.jobs import Jobs
from emulators.runpod.serverless.workers import Host, Worker, WorkerTruth

_TICK_S = 0.03
_CPU_USD_PER_VCPU_H = 0.05

# A change of one of these is a release; as the API calls it in a release's `diff`.
_RELEASED = {
    "image": "template.imageName",
    "env": "template.env",
    "args": "template.dockerArgs",
    "disk": "template.containerDiskInGb",
    "ports": "template.ports",
    "registry": "template.containerRegistryAuthId",
    "gpu": "gpuIds",
    "cpu": "instanceIds",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    id: str
    version: int
    created_at: datetime.datetime
    diff: list[dict[str, Any]]


class Endpoint:
    """`request` is the body it was created with, defaults filled in; PATCH changes it."""

    def __init__(
        self,
        host: Host,
        faults: Faults,
        *,
        id: str,
        request: dict[str, Any],
        folder: Path,
        urls: dict[str, str],
    ) -> None:
        self.id = id
        self.request = request
        self.urls = urls
        self.jobs = Jobs(host.settings)
        self.created_at = datetime.datetime.now(datetime.UTC)
        self.releases = [
            Release(id=f"rel_{secrets.token_hex(6)}", version=1, created_at=self.created_at, diff=[])
        ]
        # Requests of a load-balancer endpoint that are being answered, by worker ("" waits for one).
        self.requests: dict[str, int] = {}
        self._host = host
        self._faults = faults
        self._folder = folder
        self._workers: list[Worker] = []
        self._lock = threading.RLock()
        self._rolled = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"endpoint-{id}", daemon=True)

    def launch(self) -> None:
        self._thread.start()

    @property
    def version(self) -> int:
        return self.releases[-1].version

    @property
    def is_queue(self) -> bool:
        return bool(self.request["type"] == "QUEUE")

    @property
    def timeout_s(self) -> float:
        return float(self.request["timeout"]) / 1000

    def update(self, request: dict[str, Any]) -> None:
        """Take the whole new configuration; what a container sees of it is a release."""
        with self._lock:
            diff = [
                {"field": told, "old": self.request.get(name), "new": request.get(name)}
                for name, told in _RELEASED.items()
                if self.request.get(name) != request.get(name)
            ]
            self.request = request
            if diff:
                self.releases.append(
                    Release(
                        id=f"rel_{secrets.token_hex(6)}",
                        version=self.version + 1,
                        created_at=datetime.datetime.now(datetime.UTC),
                        diff=diff,
                    )
                )

    # -- workers -----------------------------------------------------------------------------------

    def workers(self) -> list[Worker]:
        """Those that are there, and not on their way out."""
        with self._lock:
            return [worker for worker in self._workers if worker.is_there and not worker.is_stopping]

    def ever(self) -> list[Worker]:
        with self._lock:
            return list(self._workers)

    def worker(self, id: str) -> Worker:
        """Raises Problem 404; one on its way out may still say something."""
        with self._lock:
            found = [worker for worker in self._workers if worker.id == id and worker.is_there]
        if not found:
            raise not_found("worker")
        return found[0]

    def may_take(self, worker: Worker) -> bool:
        """New jobs are for the latest release only, and for none on its way out."""
        return worker.version == self.version and not worker.is_stopping

    def is_busy(self, worker: Worker) -> bool:
        return bool(self.jobs.of(worker.id) or self.requests.get(worker.id))

    def truths(self) -> list[WorkerTruth]:
        """Every worker there ever was."""
        return [worker.truth(busy=self.is_busy(worker)) for worker in self.ever()]

    def price_usd_per_h(self, gpu: Gpu | None) -> float:
        """Of a worker."""
        if gpu is None:
            return float(self.request["cpu"][0]["vcpuCount"] * _CPU_USD_PER_VCPU_H)
        return float((gpu.serverless or 0.0) * self.request["gpu"].get("count", 1))

    def charged_usd(self) -> tuple[float, float]:
        """On GPUs, and on CPUs."""
        total = sum(worker.charged_usd() for worker in self.ever())
        return (total, 0.0) if "gpu" in self.request else (0.0, total)

    # -- what is told of it ------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        request = self.request
        workers = dict(request["workers"])
        if self.is_queue and request["scaling"]["type"] == "REQUEST_COUNT":
            workers.pop("idleTimeout", None)
        document: dict[str, Any] = {
            "id": self.id,
            "name": request["name"],
            "type": request["type"],
            "requestUrls": self.urls,
            "workers": workers,
            "scaling": request["scaling"],
            "dataCenterIds": request.get("dataCenterIds", []),
            "networkVolumes": request.get("networkVolumes", []),
            "timeout": request["timeout"],
            "flashboot": request["flashboot"],
            "createdAt": timestamp(self.created_at),
            "image": request["image"],
            "args": request.get("args", ""),
            "disk": request.get("disk", 20),
            "env": request.get("env", {}),
            "ports": request.get("ports", []),
            "registry": request.get("registry"),
        }
        if "gpu" in request:
            gpu = request["gpu"]
            document["gpu"] = {
                "pools": gpu["pools"],
                "excludedTypes": gpu.get("excludedTypes", []),
                "count": gpu.get("count", 1),
                "allowedCudaVersions": gpu.get("allowedCudaVersions", []),
                "minCudaVersion": gpu.get("minCudaVersion"),
            }
        else:
            document["gpu"] = None
            document["cpu"] = [{**cpu, "memory": 2 * cpu["vcpuCount"]} for cpu in request["cpu"]]
        return document

    def workers_document(self) -> dict[str, Any]:
        told = [worker.document(busy=self.is_busy(worker), latest=self.version) for worker in self.workers()]
        statuses = [worker["status"].lower() for worker in told]
        summary = {
            name: statuses.count(name)
            for name in ("running", "idle", "initializing", "throttled", "unhealthy")
        }
        return {
            "workers": told,
            "summary": {**summary, "total": len(told)},
            "endpointVersion": self.version,
        }

    def releases_document(self) -> dict[str, Any]:
        workers = self.workers()
        latest = sum(worker.version == self.version for worker in workers)
        return {
            "endpointVersion": self.version,
            "rollout": {
                "inProgress": latest < len(workers),
                "workersOnLatest": latest,
                "workersTotal": len(workers),
                "percentOnLatest": 100 * latest // len(workers) if workers else 0,
            },
            "releases": [
                {
                    "id": release.id,
                    "version": release.version,
                    "source": "MANUAL",
                    "buildId": None,
                    "createdByUserId": None,
                    "workerCount": sum(worker.version == release.version for worker in workers),
                    "createdAt": timestamp(release.created_at),
                    "diff": release.diff,
                }
                for release in reversed(self.releases)
            ],
        }

    def health(self) -> dict[str, Any]:
        """As the job plane tells it."""
        summary = self.workers_document()["summary"]
        del summary["total"]
        return {
            "jobs": self.jobs.counts(),
            "workers": {**summary, "ready": summary["idle"] + summary["running"]},
        }

    # -- scaling, on a thread of its own -----------------------------------------------------------

    def close(self) -> None:
        """Its workers end; returns when they have."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        for worker in self.ever():
            worker.stop(grace_s=0.0)
        for worker in self.ever():
            worker.join()

    def _run(self) -> None:
        while not self._closing.wait(_TICK_S):
            try:
                self.jobs.tidy()
                with self._lock:
                    self._drop_lost()
                    self._roll_out()
                    self._scale_down()
                    self._scale_up()
            except Exception:
                self._host.report(f"endpoint {self.id}: {traceback.format_exc()}")

    def _drop_lost(self) -> None:
        """Workers that have not pinged for too long."""
        limit = self._host.settings.worker_silence_s
        for worker in self.workers():
            if self.is_queue and worker.is_ready and time.monotonic() - worker.heard > limit:
                worker.logs.say("system", "worker exited: no heartbeat")
                worker.stop(grace_s=0.0)

    def _roll_out(self) -> None:
        """One worker at a time, and none that is busy."""
        stale = [worker for worker in self.workers() if worker.version != self.version]
        free = [worker for worker in stale if not self.is_busy(worker)]
        if not free or time.monotonic() - self._rolled < self._host.settings.rollout_step_s:
            return
        if self._faults.is_on("rollout_stuck", pod=self.request["name"]):
            return
        self._rolled = time.monotonic()
        free[0].stop()
        if len(self.workers()) < self.request["workers"]["max"]:
            self._add_worker()

    def _scale_down(self) -> None:
        scale = self.request["workers"]
        workers = self.workers()
        idle_s = scale.get("idleTimeout", 5)
        spare = len(workers) - scale["min"]
        too_many = len(workers) - max(scale["max"], scale["min"])
        for worker in workers:
            if self.is_busy(worker):
                worker.idle_since = time.monotonic()
            elif too_many > 0 or (
                spare > 0 and worker.is_ready and time.monotonic() - worker.idle_since > idle_s
            ):
                worker.stop()
                spare -= 1
                too_many -= 1

    def _scale_up(self) -> None:
        scale, scaling = self.request["workers"], self.request["scaling"]
        workers = [worker for worker in self.workers() if worker.version == self.version]
        starting = any(worker.is_placed and not worker.is_ready for worker in workers)
        waiting = self.jobs.waiting() + self.requests.get("", 0)
        wanted = scale["min"]
        if scaling["type"] == "REQUEST_COUNT":
            active = (
                waiting
                + self.jobs.running()
                + sum(count for worker, count in self.requests.items() if worker)
            )
            wanted = max(wanted, math.ceil(active / scaling["requestCount"]))
        elif waiting and (not workers or (not starting and self.jobs.waited_s() > scaling["queueDelay"])):
            wanted = max(wanted, len(workers) + 1)
        for _ in range(min(wanted, scale["max"]) - len(self.workers())):
            self._add_worker()

    def _add_worker(self) -> None:
        id = f"w{secrets.token_hex(6)}"
        name = self.request["name"]
        worker = Worker(
            self._host,
            id=id,
            endpoint=self.id,
            version=self.version,
            request=self.request,
            price_usd_per_h=self.price_usd_per_h,
            folder=self._folder / id,
            faults=self._faults.take_every(*POD_KINDS, "throttled", pod=name),
            on_lost=lambda: self.jobs.lost(id),
        )
        self._workers.append(worker)
        worker.launch()


def merged(request: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """PATCH: sections that have parts are changed part by part."""
    together = {**request, **changes}
    for name in ("workers", "gpu"):
        if name in changes and name in request:
            together[name] = {**request[name], **changes[name]}
    return together
