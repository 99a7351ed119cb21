"""The API's routes: from a request that is known to be well-formed to its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from emulators.runpod.billing import cluster_billing, pod_billing, serverless_billing
from emulators.runpod.logs import Line, PodLogs
from emulators.runpod.platform import Platform
from emulators.runpod.problems import Problem, not_found

_LOG_POLL_S = 0.05
_MOST_PER_PAGE = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A request: `path` has the values of the route's names."""

    platform: Platform
    path: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """`events` is a stream in place of a body."""

    status: int = 200
    body: Any = None
    events: AsyncIterator[bytes] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """by_pod: a pod's own key may do it, to that pod (or, if the settings say so, to its cluster)."""

    method: str
    template: str
    handle: Callable[[Call], Answer]
    by_pod: bool = False

    def match(self, path: str) -> dict[str, str] | None:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.template)
        found = re.fullmatch(pattern, path)
        return found.groupdict() if found else None


# -- pods ------------------------------------------------------------------------------------------


def list_pods(call: Call) -> Answer:
    members = call.query.get("includeClusterPods") == "true"
    return page(call, "pods", [pod.document() for pod in call.platform.present_pods(members=members)])


def create_pod(call: Call) -> Answer:
    return Answer(status=201, body=call.platform.create_pod(call.body).document())


def get_pod(call: Call) -> Answer:
    return Answer(body=call.platform.pod(call.path["id"]).document())


def update_pod(call: Call) -> Answer:
    pod = call.platform.standalone_pod(call.path["id"])
    call.platform.update(pod, call.body)
    return Answer(body=pod.document())


def delete_pod(call: Call) -> Answer:
    call.platform.delete(call.platform.standalone_pod(call.path["id"]))
    return Answer(status=204)


def act_on_pod(call: Call) -> Answer:
    pod = call.platform.standalone_pod(call.path["id"])
    call.platform.act(pod, call.body["action"])
    return Answer(status=204) if call.body["action"] == "terminate" else Answer(body=pod.document())


def pod_logs(call: Call) -> Answer:
    pod = call.platform.pod(call.path["id"])
    return follow_logs(call, pod.logs, pod.id)


def follow_logs(call: Call, logs: PodLogs, id: str) -> Answer:
    """Of the pod or worker `id`."""
    fault = call.platform.faults.take("logs_hang", pod=id)
    lines = logs.after(0)
    newest = lines[-1].number if lines else 0
    at_most = fault.lines if fault else None
    return Answer(events=_follow(logs, _backlog(call, lines), newest, call.query.get("source"), at_most))


def _backlog(call: Call, lines: list[Line]) -> list[Line]:
    """What a stream starts with: Last-Event-ID goes before `since`, and that before `tail`."""
    lines = [line for line in lines if call.query.get("source") in (None, line.source)]
    last = call.headers.get("last-event-id")
    if last:
        moment, _, number = last.partition("/")
        if number.isdigit():
            return [line for line in lines if line.number > int(number)]
        return [line for line in lines if line.at > datetime.datetime.fromisoformat(moment)]
    if "since" in call.query:
        since = datetime.datetime.fromisoformat(call.query["since"])
        return [line for line in lines if line.at >= since]
    tail = int(call.query.get("tail", "100"))
    return lines[-tail:] if tail else []


async def _follow(
    logs: PodLogs, lines: list[Line], newest: int, source: str | None, at_most: int | None
) -> AsyncIterator[bytes]:
    """`lines`, then what comes after line `newest`. Never ends by itself: a pod that is gone just says
    nothing more."""
    told = 0
    while True:
        for line in lines:
            if at_most is not None and told >= at_most:
                await asyncio.Event().wait()
            yield line.event()
            told += 1
        await asyncio.sleep(_LOG_POLL_S)
        lines = logs.after(newest, source)
        newest = lines[-1].number if lines else newest


# -- clusters --------------------------------------------------------------------------------------


def list_clusters(call: Call) -> Answer:
    return page(call, "clusters", [cluster.document() for cluster in call.platform.clusters.values()])


def create_cluster(call: Call) -> Answer:
    return Answer(status=201, body=call.platform.create_cluster(call.body).document())


def get_cluster(call: Call) -> Answer:
    return Answer(body=call.platform.cluster(call.path["id"]).document())


def update_cluster(call: Call) -> Answer:
    cluster = call.platform.cluster(call.path["id"])
    cluster.name = call.body["name"]
    return Answer(body=cluster.document())


def delete_cluster(call: Call) -> Answer:
    call.platform.delete_cluster(call.path["id"])
    return Answer(status=204)


def cluster_pods(call: Call) -> Answer:
    pods = [pod.document() for pod in call.platform.cluster(call.path["id"]).pods if pod.is_there]
    return Answer(body={"pods": pods})


# -- catalog, billing ------------------------------------------------------------------------------


def list_gpus(call: Call) -> Answer:
    return Answer(body={"gpus": [_gpu(call, id) for id in call.platform.catalog.gpus]})


def get_gpu(call: Call) -> Answer:
    if call.path["id"] not in call.platform.catalog.gpus:
        raise not_found("gpu type")
    return Answer(body=_gpu(call, call.path["id"]))


def _gpu(call: Call, id: str) -> dict[str, Any]:
    availability = "include" in call.query
    if availability and "product" not in call.query:
        raise Problem(400, "product is required with include=AVAILABILITY")
    catalog = call.platform.catalog
    return catalog.entry(
        catalog.gpus[id],
        availability=availability,
        cloud=call.query.get("cloud"),
        count=int(call.query.get("count", "1")),
        minimum_cuda=call.query.get("minCudaVersion"),
    )


def bill_pods(call: Call) -> Answer:
    return Answer(body=pod_billing(call.platform.pods.values(), call.query))


def bill_clusters(call: Call) -> Answer:
    return Answer(body=cluster_billing(call.platform.pods.values(), call.query))


def bill_serverless(call: Call) -> Answer:
    return Answer(body=serverless_billing(call.platform.serverless.all(), call.query))


# -- account ---------------------------------------------------------------------------------------


def list_secrets(call: Call) -> Answer:
    return page(call, "secrets", [_shown(name, kept) for name, kept in call.platform.secrets.items()])


def create_secret(call: Call) -> Answer:
    name = call.body["name"]
    if name in call.platform.secrets:
        raise Problem(409, f"a secret named {name} exists")
    kept = call.platform.set_secret(name, call.body["value"], call.body.get("description", ""))
    return Answer(status=201, body=_shown(name, kept))


def get_secret(call: Call) -> Answer:
    return Answer(body=_shown(*_secret(call)))


def update_secret(call: Call) -> Answer:
    name, kept = _secret(call)
    kept.update(call.body)
    return Answer(body=_shown(name, kept))


def delete_secret(call: Call) -> Answer:
    name, _ = _secret(call)
    del call.platform.secrets[name]
    return Answer(status=204)


def _secret(call: Call) -> tuple[str, dict[str, str]]:
    for name, kept in call.platform.secrets.items():
        if kept["id"] == call.path["id"]:
            return name, kept
    raise not_found("secret")


def _shown(name: str, kept: Mapping[str, str]) -> dict[str, str]:
    """Never the value."""
    return {"name": name, **{key: kept[key] for key in ("id", "description", "createdAt")}}


def list_registries(call: Call) -> Answer:
    known = call.platform.registries
    return page(call, "registries", [{"id": id, "name": name} for id, name in known.items()])


def create_registry(call: Call) -> Answer:
    id = secrets.token_hex(8)
    call.platform.registries[id] = call.body["name"]
    return Answer(status=201, body={"id": id, "name": call.body["name"]})


def get_registry(call: Call) -> Answer:
    id = call.path["id"]
    return Answer(body={"id": id, "name": _registry(call)})


def delete_registry(call: Call) -> Answer:
    _registry(call)
    del call.platform.registries[call.path["id"]]
    return Answer(status=204)


def _registry(call: Call) -> str:
    name = call.platform.registries.get(call.path["id"])
    if name is None:
        raise not_found("registry")
    return name


def page(call: Call, key: str, entries: list[Any]) -> Answer:
    limit, cursor = call.query.get("limit", str(_MOST_PER_PAGE)), call.query.get("cursor", "0")
    if not limit.isdigit() or not 1 <= int(limit) <= _MOST_PER_PAGE or not cursor.isdigit():
        raise Problem(
            422,
            "Request validation failed.",
            errors=[f"limit: must be from 1 to {_MOST_PER_PAGE}, cursor: one that was answered"],
        )
    start, end = int(cursor), int(cursor) + int(limit)
    more = end < len(entries)
    pagination = {"nextCursor": str(end) if more else None, "hasNextPage": more}
    return Answer(body={key: entries[start:end], "pagination": pagination})


ROUTES = (
    Route(method="GET", template="/v2/pods", handle=list_pods),
    Route(method="POST", template="/v2/pods", handle=create_pod),
    Route(method="GET", template="/v2/pods/{id}", handle=get_pod, by_pod=True),
    Route(method="PATCH", template="/v2/pods/{id}", handle=update_pod),
    Route(method="DELETE", template="/v2/pods/{id}", handle=delete_pod, by_pod=True),
    Route(method="POST", template="/v2/pods/{id}/action", handle=act_on_pod, by_pod=True),
    Route(method="GET", template="/v2/pods/{id}/logs", handle=pod_logs, by_pod=True),
    Route(method="GET", template="/v2/clusters", handle=list_clusters),
    Route(method="POST", template="/v2/clusters", handle=create_cluster),
    Route(method="GET", template="/v2/clusters/{id}", handle=get_cluster),
    Route(method="PATCH", template="/v2/clusters/{id}", handle=update_cluster),
    Route(method="DELETE", template="/v2/clusters/{id}", handle=delete_cluster, by_pod=True),
    Route(method="GET", template="/v2/clusters/{id}/pods", handle=cluster_pods),
    Route(method="GET", template="/v2/catalog/gpus", handle=list_gpus),
    Route(method="GET", template="/v2/catalog/gpus/{id}", handle=get_gpu),
    Route(method="GET", template="/v2/billing/pods", handle=bill_pods),
    Route(method="GET", template="/v2/billing/clusters", handle=bill_clusters),
    Route(method="GET", template="/v2/billing/serverless", handle=bill_serverless),
    Route(method="GET", template="/v2/account/secrets", handle=list_secrets),
    Route(method="POST", template="/v2/account/secrets", handle=create_secret),
    Route(method="GET", template="/v2/account/secrets/{id}", handle=get_secret),
    Route(method="PATCH", template="/v2/account/secrets/{id}", handle=update_secret),
    Route(method="DELETE", template="/v2/account/secrets/{id}", handle=delete_secret),
    Route(method="GET", template="/v2/registries", handle=list_registries),
    Route(method="POST", template="/v2/registries", handle=create_registry),
    Route(method="GET", template="/v2/registries/{id}", handle=get_registry),
    Route(method="DELETE", template="/v2/registries/{id}", handle=delete_registry),
)
