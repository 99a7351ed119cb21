"""What pods have cost, as the billing route tells it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from emulators.runpod.logs import timestamp
from emulators.runpod.pods import Pod


def pod_billing(pods: Iterable[Pod], query: Mapping[str, str]) -> dict[str, Any]:
    """All of a pod's cost stands in one bucket, the one that it was created in: the emulator's clock may
    run faster than the calendar."""
    size = query.get("bucketSize", "day")
    now = datetime.datetime.now(datetime.UTC)
    start = _bucket(_moment(query.get("startTime"), now - datetime.timedelta(days=30)), size)[0]
    end = _bucket(_moment(query.get("endTime"), now), size)[1]
    wanted = query.get("podId")
    records: list[dict[str, Any]] = []
    for pod in pods:
        if wanted in (None, pod.id) and start <= pod.created_at < end:
            first, after = _bucket(pod.created_at, size)
            records.append(
                {"startTime": timestamp(first), "endTime": timestamp(after), "podId": pod.id, **_amounts(pod)}
            )
    totals = {
        name: sum(record[name] for record in records)
        for name in ("totalAmount", "gpuAmount", "cpuAmount", "diskAmount")
    }
    return {
        "records": records,
        "metadata": {
            "query": {
                "startTime": timestamp(start),
                "endTime": timestamp(end),
                "bucketSize": size,
                "podId": wanted,
            },
            "recordCount": len(records),
            "uniquePodCount": len({record["podId"] for record in records}),
            "totals": totals,
        },
    }


def _amounts(pod: Pod) -> dict[str, float]:
    """USD; disks are free here."""
    total = pod.hours() * pod.placement.price_usd_per_h
    on_gpu = pod.placement.gpu is not None
    return {
        "totalAmount": total,
        "gpuAmount": total if on_gpu else 0.0,
        "cpuAmount": 0.0 if on_gpu else total,
        "diskAmount": 0.0,
    }


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
