"""What pods, clusters and endpoints have cost, as the billing routes tell it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emulators.runpod.logs import timestamp
from emulators.runpod.pods import Pod
from emulators.runpod.serverless.endpoints import Endpoint


def pod_billing(pods: Iterable[Pod], query: Mapping[str, str]) -> dict[str, Any]:
    """Members of a cluster are billed with it."""
    return _bill("pod", {pod.id: _Rented.of("pod", [pod]) for pod in pods if pod.membership is None}, query)


def cluster_billing(pods: Iterable[Pod], query: Mapping[str, str]) -> dict[str, Any]:
    clusters: dict[str, list[Pod]] = {}
    for pod in pods:
        if pod.membership is not None:
            clusters.setdefault(pod.membership.cluster, []).append(pod)
    return _bill("cluster", {id: _Rented.of("cluster", pods) for id, pods in clusters.items()}, query)


def serverless_billing(endpoints: Iterable[Endpoint], query: Mapping[str, str]) -> dict[str, Any]:
    rented = {}
    for endpoint in endpoints:
        on_gpu, on_cpu = endpoint.charged_usd()
        rented[endpoint.id] = _Rented(endpoint.created_at, _amounts("serverless", on_gpu, on_cpu))
    return _bill("serverless", rented, query)


@dataclasses.dataclass(frozen=True)
class _Rented:
    created_at: datetime.datetime
    amounts: dict[str, float]

    @classmethod
    def of(cls, kind: str, pods: Sequence[Pod]) -> _Rented:
        on_gpu = sum(pod.hours() * pod.placement.price_usd_per_h for pod in pods if pod.placement.gpu)
        on_cpu = sum(pod.hours() * pod.placement.price_usd_per_h for pod in pods if not pod.placement.gpu)
        return cls(pods[0].created_at, _amounts(kind, on_gpu, on_cpu))


def _bill(kind: str, rented: Mapping[str, _Rented], query: Mapping[str, str]) -> dict[str, Any]:
    """All that one thing cost stands in one bucket, the one that it was created in: the emulator's clock
    may run faster than the calendar."""
    size = query.get("bucketSize", "day")
    now = datetime.datetime.now(datetime.UTC)
    start = _bucket(_moment(query.get("startTime"), now - datetime.timedelta(days=30)), size)[0]
    end = _bucket(_moment(query.get("endTime"), now), size)[1]
    wanted = query.get(f"{kind}Id")
    records: list[dict[str, Any]] = []
    for id, one in rented.items():
        if wanted in (None, id) and start <= one.created_at < end:
            first, after = _bucket(one.created_at, size)
            records.append(
                {
                    "startTime": timestamp(first),
                    "endTime": timestamp(after),
                    f"{kind}Id": id,
                    **one.amounts,
                }
            )
    totals = {name: sum(record[name] for record in records) for name in _amounts(kind, 0, 0)}
    return {
        "records": records,
        "metadata": {
            "query": {
                "startTime": timestamp(start),
                "endTime": timestamp(end),
                "bucketSize": size,
                f"{kind}Id": wanted,
            },
            "recordCount": len(records),
            f"unique{kind.title()}Count": len(records),
            "totals": totals,
        },
    }


def _amounts(kind: str, on_gpu: float, on_cpu: float) -> dict[str, float]:
    """USD; disks and the network between pods are free here."""
    amounts = {"totalAmount": on_gpu + on_cpu, "gpuAmount": on_gpu, "diskAmount": 0.0}
    if kind == "cluster":
        return {**amounts, "networkingAmount": 0.0}
    fee = {"feeAmount": 0.0} if kind == "serverless" else {}
    return {**amounts, "cpuAmount": on_cpu, **fee}


def _moment(text: str | None, otherwise: datetime.datetime) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text) if text else otherwise


def _bucket(at: datetime.datetime, size: str) -> tuple[datetime.datetime, datetime.datetime]:
    """Start and end of the bucket that `at` falls into."""
    day = at.astimezone(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match size:
        case "hour":
            start = at.astimezone(datetime.UTC).replace(minute=0, second=0, microsecond=0)
            return start, start + datetime.timedelta(hours=1)
        case "day":
            return day, day + datetime.timedelta(days=1)
        case "week":
            start = day - datetime.timedelta(days=day.weekday())
            return start, start + datetime.timedelta(days=7)
        case "month":
            start = day.replace(day=1)
            return start, (start + datetime.timedelta(days=32)).replace(day=1)
        case _:
            start = day.replace(month=1, day=1)
            return start, start.replace(year=start.year + 1)
