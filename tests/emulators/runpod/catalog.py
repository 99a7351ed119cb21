"""GPU types, data centers, prices and stock.

Ids and prices per GPU and hour as third parties read them from the real catalog in October 2026; a test
sets its own where it matters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

CUDA_VERSIONS = ("12.4", "12.8", "13.0", "13.2")
DATA_CENTERS = {"US-KS-2": "US-KS-2", "EU-RO-1": "EU-RO-1", "CA-MTL-1": "CA-MTL-1"}


@dataclasses.dataclass(kw_only=True)
class Gpu:
    """secure, community, serverless: USD per GPU and hour; None where that does not have the type."""

    id: str
    name: str
    memory: int
    secure: float | None
    community: float | None = None
    pool: str | None = None
    serverless: float | None = None
    max_count: int = 8
    cuda_versions: tuple[str, ...] = CUDA_VERSIONS

    def price(self, cloud: str) -> float | None:
        return self.secure if cloud == "SECURE" else self.community


# Type, name, GB of memory, price in the secure and in the community cloud, serverless pool and price.
_GPUS = (
    ("NVIDIA H100 80GB HBM3", "H100 SXM", 80, 3.99, 2.69, "ADA_80_PRO", 4.18),
    ("NVIDIA H100 PCIe", "H100 PCIe", 80, 2.89, 1.99, "ADA_80_PRO", 4.18),
    ("NVIDIA H100 NVL", "H100 NVL", 94, 3.19, None, "ADA_80_PRO", 4.18),
    ("NVIDIA H200", "H200 SXM", 141, 4.59, None, "HOPPER_141", 5.58),
    ("NVIDIA B200", "B200", 180, 6.79, None, "BLACKWELL_180", 8.64),
    ("NVIDIA A100-SXM4-80GB", "A100 SXM", 80, 1.79, 1.39, "AMPERE_80", 2.74),
    ("NVIDIA A100 80GB PCIe", "A100 PCIe", 80, 1.79, 1.39, "AMPERE_80", 2.74),
    ("NVIDIA L40S", "L40S", 48, 0.99, 0.79, "ADA_48_PRO", 1.91),
    ("NVIDIA GeForce RTX 4090", "RTX 4090", 24, 0.69, 0.44, "ADA_24", 1.12),
)


def default_gpus() -> list[Gpu]:
    return [
        Gpu(
            id=id,
            name=name,
            memory=memory,
            secure=secure,
            community=community,
            pool=pool,
            serverless=serverless,
        )
        for id, name, memory, secure, community, pool, serverless in _GPUS
    ]


class Catalog:
    """stock: free GPUs per (type, data center, cloud); a place that is not in it has as many as is asked."""

    def __init__(self) -> None:
        self.gpus = {gpu.id: gpu for gpu in default_gpus()}
        self.stock: dict[tuple[str, str, str], int] = {}

    def set_price(self, gpu: str, *, secure: float | None = None, community: float | None = None) -> None:
        """USD per GPU and hour; None takes the type out of that cloud."""
        self.gpus[gpu].secure, self.gpus[gpu].community = secure, community

    def free(self, gpu: str, data_center: str, cloud: str) -> int | None:
        """None: without end."""
        return self.stock.get((gpu, data_center, cloud))

    def take(self, gpu: str, data_center: str, cloud: str, count: int) -> None:
        """A negative count gives back."""
        place = (gpu, data_center, cloud)
        if place in self.stock:
            self.stock[place] -= count

    def entry(
        self, gpu: Gpu, *, availability: bool, cloud: str | None, count: int, minimum_cuda: str | None
    ) -> dict[str, Any]:
        """A GPU type as the catalog route tells it."""
        entry: dict[str, Any] = {
            "id": gpu.id,
            "name": gpu.name,
            "pool": gpu.pool,
            "manufacturer": "NVIDIA",
            "memory": gpu.memory,
            "secure": gpu.secure is not None,
            "community": gpu.community is not None,
            "price": {
                "secure": gpu.secure or 0.0,
                "community": gpu.community or 0.0,
                **({} if gpu.serverless is None else {"serverless": gpu.serverless}),
            },
            "maxCount": {
                "secure": gpu.max_count if gpu.secure is not None else 0,
                "community": gpu.max_count if gpu.community is not None else 0,
            },
        }
        if not availability:
            return entry
        clouds = [name for name in ("SECURE", "COMMUNITY") if cloud in (None, name)]
        fits = minimum_cuda is None or any(_newer(version, minimum_cuda) for version in gpu.cuda_versions)
        levels = {
            data_center: max(
                (self._level(gpu, data_center, name, count) for name in clouds), key=_LEVELS.index
            )
            if fits
            else "NONE"
            for data_center in DATA_CENTERS
        }
        best = max(levels.values(), key=_LEVELS.index)
        return {
            **entry,
            "availability": best,
            "dataCenters": [
                {"id": id, "name": DATA_CENTERS[id], "availability": level} for id, level in levels.items()
            ],
            "cudaVersions": [
                {"version": version, "available": best != "NONE"} for version in gpu.cuda_versions
            ],
        }

    def _level(self, gpu: Gpu, data_center: str, cloud: str, count: int) -> str:
        if gpu.price(cloud) is None:
            return "NONE"
        free = self.free(gpu.id, data_center, cloud)
        if free is None:
            return "HIGH"
        machines = free // count
        return "NONE" if machines < 1 else "LOW" if machines < 3 else "MEDIUM" if machines < 9 else "HIGH"


_LEVELS = ("NONE", "LOW", "MEDIUM", "HIGH")


def cuda_version(gpu: Gpu, wanted: dict[str, Any]) -> str | None:
    """The newest of the type's CUDA versions that a request's `gpu` section allows."""
    allowed = wanted.get("allowedCudaVersions")
    minimum = wanted.get("minCudaVersion")
    fitting = [
        version
        for version in gpu.cuda_versions
        if (not allowed or version in allowed) and (minimum is None or _newer(version, minimum))
    ]
    return fitting[-1] if fitting else None


def _newer(version: str, minimum: str) -> bool:
    """Or as new."""
    return [int(part) for part in version.split(".")] >= [int(part) for part in minimum.split(".")]
