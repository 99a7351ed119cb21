"""A client of RunPod's REST API v2: pods, clusters, serverless endpoints, the catalog, bills."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx

from dagster_nanochat.launch.runpod.endpoint_models import (
    Endpoint,
    EndpointChange,
    EndpointRequest,
    EndpointWorkers,
    Releases,
    ServerlessBilling,
)
from dagster_nanochat.launch.runpod.errors import API_KEY_ENV, API_URL_ENV, NotFound, RunPodError
from dagster_nanochat.launch.runpod.exchange import API_URL, Exchange
from dagster_nanochat.launch.runpod.jobs import JobClient, urls_of
from dagster_nanochat.launch.runpod.models import (
    Cloud,
    Cluster,
    ClusterBilling,
    ClusterRequest,
    GpuType,
    LogSource,
    Pod,
    PodBilling,
    PodRequest,
    Product,
    Secret,
)


class RunPodClient(Exchange):
    """Close it, or use it in a ``with``. Every method raises a `RunPodError` of the class that says what to
    do."""

    def __init__(self, api_key: str, *, base_url: str = API_URL, **options: Any) -> None:
        """options: those of `Exchange`. Raises ValueError."""
        super().__init__(api_key, base_url=base_url, **options)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, **options: Any) -> RunPodClient:
        """With the key of RUNPOD_API_KEY, at RUNPOD_API_URL (whole, with /v2) if set. Raises ValueError
        that names the variable which is missing or wrong."""
        key = environment.get(API_KEY_ENV, "").strip()
        if not key:
            raise ValueError(
                f"{API_KEY_ENV} is not set: make a key in RunPod's console (Settings, API Keys) and put it "
                "into the environment or .env"
            )
        return cls(key, base_url=environment.get(API_URL_ENV, "").strip() or API_URL, **options)

    # ----------------------------------------------------------------------------------------------
    # Pods

    def create_pod(self, request: PodRequest) -> Pod:
        """Ask for a machine. Raises `NoCapacity`, `MaybeCreated`, …"""
        return self._create("/pods", request.body(), Pod)

    def get_pod(self, pod_id: str) -> Pod | None:
        """None once it is gone."""
        path = f"/pods/{_segment(pod_id)}"
        try:
            return self._read(Pod, self._json("GET", path), f"GET {path}")
        except NotFound:
            return None

    def list_pods(self, *, include_cluster_pods: bool = False) -> list[Pod]:
        params = {"includeClusterPods": "true"} if include_cluster_pods else {}
        return self._pages("/pods", "pods", Pod, params)

    def delete_pod(self, pod_id: str) -> None:
        """End a machine; one that is gone already will do. It may be seen for some seconds longer."""
        self._remove("DELETE", f"/pods/{_segment(pod_id)}")

    def terminate(self, pod_id: str) -> None:
        """The same by the other route, which a key of the pod's own is known to be allowed."""
        self._remove("POST", f"/pods/{_segment(pod_id)}/action", body={"action": "terminate"})

    def pod_logs(
        self, pod_id: str, *, source: LogSource | None = None, tail: int = 100, max_seconds: float = 10.0
    ) -> list[str]:
        """The last `tail` (at most 5,000) lines that RunPod still has: the container's, the host's
        (``system``), or both.

        RunPod leaves the stream open and goes quiet after the last line, so that a silence of half of
        max_seconds is its end; nothing is sent twice. Raises `NotFound` once the pod is gone.
        """
        path = f"/pods/{_segment(pod_id)}/logs"
        params: dict[str, str | int] = {"tail": tail, **({"source": source} if source else {})}
        half_s = max_seconds / 2
        end = self._clock() + half_s
        lines: list[str] = []
        begun = False
        self._wait_for_quota()
        try:
            with self._http.stream(
                "GET",
                self.base_url + path,
                params=params,
                headers={"Accept": "text/event-stream"},
                timeout=httpx.Timeout(half_s),
            ) as response:
                self._note_quota(response)
                if not response.is_success:
                    response.read()
                    raise self._refused(response, f"GET {path}")
                begun = True
                unfinished = ""
                for text in response.iter_text():
                    *events, unfinished = (unfinished + text).split("\n")
                    lines += [
                        self._redacted(_log_line(event)) for event in events if event.startswith("data:")
                    ]
                    if len(lines) >= tail or self._clock() > end:
                        break
        except httpx.RequestError as error:
            # Silence is how a stream ends, and may be all there is of it; so is breaking off, once it began.
            if not (begun or isinstance(error, httpx.ReadTimeout)):
                raise self._unreachable(error, f"GET {path}") from error
        return lines[:tail]

    # ----------------------------------------------------------------------------------------------
    # Clusters

    def create_cluster(self, request: ClusterRequest) -> Cluster:
        """Ask for several machines at once. Raises as `create_pod` does."""
        return self._create("/clusters", request.body(), Cluster)

    def get_cluster(self, cluster_id: str) -> Cluster | None:
        """None once it is gone."""
        path = f"/clusters/{_segment(cluster_id)}"
        try:
            return self._read(Cluster, self._json("GET", path), f"GET {path}")
        except NotFound:
            return None

    def list_clusters(self) -> list[Cluster]:
        return self._pages("/clusters", "clusters", Cluster)

    def cluster_pods(self, cluster_id: str) -> list[Pod]:
        """The members, each with its `cluster` (rank, address). Raises `NotFound` once it is gone."""
        return self._pages(f"/clusters/{_segment(cluster_id)}/pods", "pods", Pod)

    def delete_cluster(self, cluster_id: str) -> None:
        """End the cluster with all of its machines; one that is gone already will do."""
        self._remove("DELETE", f"/clusters/{_segment(cluster_id)}")

    # ----------------------------------------------------------------------------------------------
    # Serverless endpoints

    def create_endpoint(self, request: EndpointRequest) -> Endpoint:
        """Raises `QuotaExceeded`, `MaybeCreated`, …"""
        return self._create("/serverless", request.body(), Endpoint)

    def update_endpoint(self, endpoint_id: str, change: EndpointChange) -> Endpoint:
        """Change what `change` names. Another image or environment is a new release, which workers take on
        one by one. Raises `QuotaExceeded`, `NotFound`, …"""
        path = f"/serverless/{_segment(endpoint_id)}"
        what = f"PATCH {path}"
        response = self._exchange("PATCH", path, body=change.body())
        return self._read(Endpoint, self._document(response, what), what)

    def get_endpoint(self, endpoint_id: str) -> Endpoint | None:
        """None once it is gone."""
        path = f"/serverless/{_segment(endpoint_id)}"
        try:
            return self._read(Endpoint, self._json("GET", path), f"GET {path}")
        except NotFound:
            return None

    def list_endpoints(self) -> list[Endpoint]:
        return self._pages("/serverless", "endpoints", Endpoint)

    def endpoint_workers(self, endpoint_id: str) -> EndpointWorkers:
        """The machines that it has now. Raises `NotFound` once it is gone."""
        path = f"/serverless/{_segment(endpoint_id)}/workers"
        return self._read(EndpointWorkers, self._json("GET", path), f"GET {path}")

    def endpoint_releases(self, endpoint_id: str) -> Releases:
        """How far the newest release has come. Raises `NotFound` once it is gone."""
        path = f"/serverless/{_segment(endpoint_id)}/releases"
        return self._read(Releases, self._json("GET", path), f"GET {path}")

    def delete_endpoint(self, endpoint_id: str) -> None:
        """With its workers and its queue; one that is gone already will do."""
        self._remove("DELETE", f"/serverless/{_segment(endpoint_id)}")

    def jobs(self, endpoint: Endpoint) -> JobClient:
        """A client of its jobs, with the same key. Close it, too."""
        return JobClient(
            self._key.get_secret_value(), urls_of(endpoint), sleep=self._sleep, clock=self._clock
        )

    # ----------------------------------------------------------------------------------------------
    # Catalog and account

    def gpu_types(
        self,
        product: Product = "POD",
        *,
        cloud: Cloud = "SECURE",
        count: int = 1,
        min_cuda_version: str | None = None,
        with_availability: bool = True,
    ) -> list[GpuType]:
        """The catalog, with what is free of `count` GPUs in one machine on `cloud`."""
        params: dict[str, str | int] = {}
        if with_availability:
            params = {"include": "AVAILABILITY", "product": product, "cloud": cloud, "count": count}
            if min_cuda_version:
                params["minCudaVersion"] = min_cuda_version
        found = self._pages("/catalog/gpus", "gpus", GpuType, params)
        return [gpu_type.model_copy(update={"asked_cloud": cloud}) for gpu_type in found]

    def secrets(self) -> list[str] | None:
        """Names of the account's secrets; None where the API has no such route."""
        try:
            return [secret.name for secret in self._pages("/account/secrets", "secrets", Secret)]
        except RunPodError as error:
            if error.status in (404, 405):
                return None
            raise

    def billing_pods(
        self, start: datetime, end: datetime | None = None, *, bucket: str = "hour", pod_id: str | None = None
    ) -> list[PodBilling]:
        """What pods cost from start to end (default: now), a record for each pod and bucket (hour, day)."""
        return self._pages(
            "/billing/pods", "records", PodBilling, _billed(start, end, bucket, "podId", pod_id)
        )

    def billing_clusters(
        self,
        start: datetime,
        end: datetime | None = None,
        *,
        bucket: str = "hour",
        cluster_id: str | None = None,
    ) -> list[ClusterBilling]:
        """The same of clusters."""
        return self._pages(
            "/billing/clusters",
            "records",
            ClusterBilling,
            _billed(start, end, bucket, "clusterId", cluster_id),
        )

    def billing_serverless(
        self, start: datetime, end: datetime | None = None, *, bucket: str = "day"
    ) -> list[ServerlessBilling]:
        """What serverless endpoints cost, a record for each endpoint and bucket."""
        return self._pages(
            "/billing/serverless",
            "records",
            ServerlessBilling,
            _billed(start, end, bucket, "serverlessId", None),
        )


def _segment(identifier: str) -> str:
    return quote(identifier, safe="")


def _billed(start: datetime, end: datetime | None, bucket: str, name: str, id: str | None) -> dict[str, str]:
    query = {"startTime": _rfc3339(start), "bucketSize": bucket}
    if end:
        query["endTime"] = _rfc3339(end)
    return {**query, name: id} if id else query


def _rfc3339(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _log_line(event: str) -> str:
    """The line of an event's JSON, or its data as they are where they are something else."""
    data = event.removeprefix("data:").strip()
    try:
        return str(json.loads(data)["line"])
    except (ValueError, KeyError, TypeError):
        return data
