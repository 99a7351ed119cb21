"""A client of RunPod's REST API v2.

Reading, deleting and terminating may be repeated without harm, and are, a few times. Creating may not:
RunPod has been seen to answer 500 and create the machine (transformerlab-app #2305). So a creation is
sent again only after 429, and an outcome that nobody knows raises `MaybeCreated`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from dagster_nanochat.launch.runpod.errors import (
    API_KEY_ENV,
    API_URL_ENV,
    MaybeCreated,
    NotFound,
    Problem,
    RateLimited,
    RunPodError,
    Unavailable,
    problem_of,
    refusal,
)
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

API_URL = "https://api.runpod.io/v2"
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
# RunPod looks for a machine before it answers.
CREATE_TIMEOUT_S = 60.0
ATTEMPTS = 4
# Of one wait, for a quota or between attempts. RunPod's shortest quota is by the minute.
MAX_WAIT_S = 60.0

_Model = TypeVar("_Model", bound=BaseModel)
# The connection was not made, so nothing was sent.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class RunPodClient:
    """Synchronous; one may be used by several threads. Close it, or use it in a ``with``.

    Every method raises a `RunPodError` of the class that says what to do. sleep, clock (seconds,
    monotonic) and transport are for tests.
    """

    def __init__(
        self,
        api_key: str,
        *,
        base_url: str = API_URL,
        transport: httpx.BaseTransport | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
        create_timeout_s: float = CREATE_TIMEOUT_S,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # What is no header would be shown in the error that sending it raises.
        if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise ValueError(f"{API_KEY_ENV} is empty or has characters that no RunPod key has")
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{API_URL_ENV}={base_url!r} is not a URL such as {API_URL}")
        self.base_url = base_url.rstrip("/")
        self._key = SecretStr(api_key)
        self._create_timeout = httpx.Timeout(create_timeout_s, connect=CONNECT_TIMEOUT_S)
        self._attempts = attempts
        self._sleep, self._clock = sleep, clock
        self._lock = threading.Lock()
        self._quota_at = 0.0
        self._http = httpx.Client(
            transport=transport,
            timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
            headers={
                "Authorization": f"Bearer {api_key}",
                "User-Agent": f"dagster-nanochat/{version('dagster-nanochat')}",
                "Accept": "application/json, application/problem+json",
            },
        )

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

    def __repr__(self) -> str:
        return f"RunPodClient({self.base_url!r})"

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RunPodClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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

    # ----------------------------------------------------------------------------------------------
    # Exchanges

    def _create(self, path: str, body: Mapping[str, Any], model: type[_Model]) -> _Model:
        what = f"POST {path}"
        try:
            response = self._exchange("POST", path, body=body, creates=True)
        except Unavailable as error:
            if error.status is None and isinstance(error.__cause__, _NOT_SENT):
                raise
            raise MaybeCreated(error.what, error.problem) from error
        try:
            return self._read(model, self._document(response, what), what)
        except RunPodError as error:
            raise MaybeCreated(error.what, error.problem) from error

    def _remove(self, method: str, path: str, *, body: Mapping[str, Any] | None = None) -> None:
        try:
            self._exchange(method, path, body=body)
        except NotFound:
            return

    def _pages(
        self, path: str, key: str, model: type[_Model], params: Mapping[str, str | int] | None = None
    ) -> list[_Model]:
        what = f"GET {path}"
        items: list[_Model] = []
        cursors: set[str] = set()
        query = dict(params or {})
        while True:
            document = self._json("GET", path, params=query)
            # Missing is not empty: a sweeper must never take a strange answer for "no machines".
            if key not in document:
                raise RunPodError(f"{what}: the answer has no {key!r}; is {self.base_url} RunPod's API v2?")
            items += [self._read(model, item, what) for item in document[key] or ()]
            cursor = (document.get("pagination") or {}).get("nextCursor")
            if not cursor:
                return items
            if cursor in cursors:
                raise RunPodError(f"{what}: page {len(cursors) + 1} leads to a page that was read already")
            cursors.add(cursor)
            query["cursor"] = cursor

    def _json(self, method: str, path: str, *, params: Mapping[str, str | int] | None = None) -> Any:
        return self._document(self._exchange(method, path, params=params), f"{method} {path}")

    def _document(self, response: httpx.Response, what: str) -> dict[str, Any]:
        try:
            document = response.json()
        except ValueError:
            document = None
        if isinstance(document, dict):
            return document
        raise RunPodError(
            f"{what}: HTTP {response.status_code} with something that is not a JSON object; is "
            f"{self.base_url} RunPod's API v2?",
            Problem(request_id=response.headers.get("x-request-id")),
        )

    def _read(self, model: type[_Model], document: Any, what: str) -> _Model:
        try:
            return model.model_validate(document)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
                for item in error.errors(include_input=False)
            )
            raise RunPodError(f"{what}: a {model.__name__} that cannot be read ({wrong})") from error

    def _exchange(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: Mapping[str, Any] | None = None,
        creates: bool = False,
    ) -> httpx.Response:
        """Send until it succeeds, as often as may be. Raises what the last attempt came to."""
        what = f"{method} {path}"
        again = (RateLimited,) if creates else (RateLimited, Unavailable)
        attempt = 0
        while True:
            attempt += 1
            self._wait_for_quota()
            failure: RunPodError
            try:
                response = self._http.request(
                    method,
                    self.base_url + path,
                    params=params,
                    json=body,
                    timeout=self._create_timeout if creates else httpx.USE_CLIENT_DEFAULT,
                )
            except httpx.RequestError as error:
                failure = self._unreachable(error, what)
                failure.__cause__ = error
            else:
                self._note_quota(response)
                if response.is_success:
                    return response
                failure = self._refused(response, what)
            wait_s = failure.retry_after_s or min(MAX_WAIT_S, 2.0 ** (attempt - 1))
            if attempt >= self._attempts or wait_s > MAX_WAIT_S or not isinstance(failure, again):
                raise failure
            self._sleep(wait_s)

    def _refused(self, response: httpx.Response, what: str) -> RunPodError:
        try:
            document = json.loads(self._redacted(response.text))
        except ValueError:
            document = None
        text = self._redacted(response.text)
        return refusal(what, problem_of(response.status_code, document, text, response.headers))

    def _unreachable(self, error: httpx.RequestError, what: str) -> Unavailable:
        said = self._redacted(str(error))
        reason = f"{type(error).__name__}{f' ({said})' if said else ''}"
        return Unavailable(f"{what}: no answer from {self.base_url}: {reason}")

    def _redacted(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), "[the key]")

    # ----------------------------------------------------------------------------------------------
    # Quotas

    def _note_quota(self, response: httpx.Response) -> None:
        """Where a quota is used up, no thread asks before its window ends (or MAX_WAIT_S have passed)."""
        wait_s = max(_exhausted_s(response.headers.get("ratelimit", "")), default=0.0)
        if wait_s:
            with self._lock:
                self._quota_at = max(self._quota_at, self._clock() + min(wait_s, MAX_WAIT_S))

    def _wait_for_quota(self) -> None:
        with self._lock:
            wait_s = self._quota_at - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)


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


def _exhausted_s(header: str) -> list[float]:
    """Seconds until the windows of ``"minute";r=0;t=12, "hour";r=2800;t=1812`` end that allow no more."""
    waits = []
    for window in header.split(","):
        values = dict(part.strip().split("=", 1) for part in window.split(";") if "=" in part)
        if values.get("r") == "0" and values.get("t", "").isdecimal():
            waits.append(float(values["t"]))
    return waits


def _log_line(event: str) -> str:
    """The line of an event's JSON, or its data as they are where they are something else."""
    data = event.removeprefix("data:").strip()
    try:
        return str(json.loads(data)["line"])
    except (ValueError, KeyError, TypeError):
        return data
