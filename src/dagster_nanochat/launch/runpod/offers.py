"""Which machine: RunPod's catalog, sifted by the settings and ranked by what finishing will cost."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence

from dagster_nanochat.launch.base import Offer, Request
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings
from dagster_nanochat.launch.runpod.models import Cloud, GpuType, Stock
from nanochat.failures import AttemptFailed, Failure
from nanochat.machine import GPU_SHARE, UNKNOWN_GPU_FLOPS, peak_bf16_flops

# Paid for before the first step: the image is pulled, data fetched, kernels compiled. Not measured.
START_H = 0.2
# What scarce machines' cost counts as in the ranking, not in the estimate: so much dearer a plentiful
# machine may be and still come first, since a scarce one is more often refused or has no successor when
# it is lost.
SCARCITY = {Stock.HIGH: 1.0, Stock.MEDIUM: 1.05, Stock.LOW: 1.15}
# USD of a GB of disk for a month, container's or volume's of a running pod (RunPod's documentation).
DISK_USD_PER_GB_MONTH = 0.10
HOURS_PER_MONTH = 730
# Without bfloat16, and dropped by CUDA 13.
TOO_OLD = ("V100",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPodOffer(Offer):
    """`nodes` machines of `gpu_count` GPUs. price_usd_per_h is for all of them with their disks, of which
    disk_usd_per_h. memory_gib: of each GPU."""

    gpu_type_id: str
    gpu_count: int
    nodes: int
    cloud: Cloud
    memory_gib: float
    stock: Stock
    disk_usd_per_h: float
    data_center_ids: tuple[str, ...]

    def row(self, flops: float | None) -> dict[str, str | float | None]:
        return {**super().row(flops), "stock": self.stock.value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejection:
    """Something in the catalog that will not do. scarce: it would, were it free."""

    name: str
    reason: str
    scarce: bool = False


class NoOffer(AttemptFailed):
    """Nothing will do. `NO_CAPACITY` where waiting may help, else `BAD_REQUEST`."""

    def __init__(self, rejections: Sequence[Rejection]) -> None:
        names: dict[str, list[str]] = {}
        for rejection in rejections:
            names.setdefault(rejection.reason, []).append(rejection.name)
        why = "; ".join(f"{reason}: {', '.join(which)}" for reason, which in names.items())
        scarce = any(rejection.scarce for rejection in rejections)
        super().__init__(
            Failure.NO_CAPACITY if scarce else Failure.BAD_REQUEST,
            f"no offer of RunPod will do: {why or 'its catalog is empty'}",
        )
        self.rejections = tuple(rejections)


def find_offers(
    client: RunPodClient,
    request: Request,
    settings: RunPodSettings,
    flops: float | None = None,
    *,
    disk_gb: int = 0,
) -> list[RunPodOffer]:
    """Ask the catalog about every cloud that will do, and rank what there is. Raises `NoOffer` and
    `RunPodError`."""
    catalog = [
        gpu_type
        for cloud in settings.clouds
        for gpu_type in client.gpu_types(
            "CLUSTER" if settings.nodes > 1 else "POD",
            cloud=cloud,
            count=settings.gpu_count or request.gpus,
            min_cuda_version=settings.min_cuda_version,
        )
    ]
    return rank_offers(catalog, request, settings, flops, disk_gb=disk_gb)


def rank_offers(
    gpu_types: Iterable[GpuType],
    request: Request,
    settings: RunPodSettings,
    flops: float | None = None,
    *,
    disk_gb: int = 0,
) -> list[RunPodOffer]:
    """What will do, the cheapest to finish first. Raises `NoOffer` that says why nothing does.

    gpu_types: the catalog, once for every cloud (a line counts for its `asked_cloud`). flops: of the
    stage in all; without them the cheapest FLOP comes first. disk_gb: of each machine, where the
    settings name none.
    """
    offers, rejections = sift(gpu_types, request, settings, flops, disk_gb=disk_gb)
    if not offers:
        raise NoOffer(rejections)
    return offers


def sift(
    gpu_types: Iterable[GpuType],
    request: Request,
    settings: RunPodSettings,
    flops: float | None = None,
    *,
    disk_gb: int = 0,
) -> tuple[list[RunPodOffer], list[Rejection]]:
    """The same, and what was rejected and why; the offers may be none. GPU types that the settings do
    not name are no rejections."""
    catalog = list(gpu_types)
    rejections = list(_not_in_catalog(catalog, settings))
    offers = []
    for gpu_type in catalog:
        if settings.gpu_type_ids and gpu_type.id not in settings.gpu_type_ids:
            continue
        verdict = _judge(gpu_type, request, settings, flops, disk_gb)
        if isinstance(verdict, Rejection):
            rejections.append(verdict)
        else:
            offers.append(verdict)
    return sorted(offers, key=lambda offer: _rank(offer, flops)), rejections


def _judge(
    gpu_type: GpuType, request: Request, settings: RunPodSettings, flops: float | None, disk_gb: int
) -> RunPodOffer | Rejection:
    cloud = gpu_type.asked_cloud
    gpus = settings.gpu_count or request.gpus
    memory_gib = settings.min_memory_gib or request.min_gpu_memory_gib
    name = f"{gpus} x {gpu_type.id} ({cloud.lower()} cloud)"
    if settings.nodes > 1:
        name = f"{settings.nodes} x {name}"

    def rejected(reason: str, *, scarce: bool = False) -> Rejection:
        return Rejection(name=name, reason=reason, scarce=scarce)

    if gpu_type.manufacturer not in (None, "NVIDIA"):
        return rejected("not an NVIDIA GPU")
    if any(part in gpu_type.id for part in TOO_OLD):
        return rejected("too old for bfloat16")
    if gpu_type.memory < memory_gib:
        return rejected(f"has less than {memory_gib:g} GiB of memory")
    gpu_usd_per_h = gpu_type.price.of(cloud)
    if not gpu_type.offered_on(cloud) or not gpu_usd_per_h:
        return rejected("not offered on this cloud")
    most = gpu_type.max_count.of(cloud)
    if most is not None and gpus > most:
        return rejected(f"no machine has {gpus} of them")
    disk = (settings.container_disk_gb or disk_gb) + (settings.volume_disk_gb or 0)
    disk_usd_per_h = settings.nodes * disk * DISK_USD_PER_GB_MONTH / HOURS_PER_MONTH
    price = settings.nodes * gpus * gpu_usd_per_h + disk_usd_per_h
    if settings.max_price_usd_per_h and price > settings.max_price_usd_per_h:
        return rejected(f"costs more than max_price_usd_per_h, ${settings.max_price_usd_per_h:g}")
    stock = _stock(gpu_type, settings.data_center_ids)
    if stock is Stock.NONE:
        where = f" in {', '.join(settings.data_center_ids)}" if settings.data_center_ids else ""
        return rejected(f"none free{where}", scarce=True)
    if not _has_cuda(gpu_type, settings.min_cuda_version):
        return rejected(f"none free with CUDA {settings.min_cuda_version} or later", scarce=True)
    speed = GPU_SHARE * settings.nodes * gpus * (peak_bf16_flops(gpu_type.id) or UNKNOWN_GPU_FLOPS)
    offer = RunPodOffer(
        name=name,
        price_usd_per_h=price,
        flops_per_s=speed,
        start_h=START_H,
        gpu_type_id=gpu_type.id,
        gpu_count=gpus,
        nodes=settings.nodes,
        cloud=cloud,
        memory_gib=gpu_type.memory,
        stock=stock,
        disk_usd_per_h=disk_usd_per_h,
        data_center_ids=settings.data_center_ids,
    )
    if flops is not None and settings.deadline_h and offer.hours(flops) > settings.deadline_h:
        return rejected(f"takes longer than deadline_h, {settings.deadline_h:g} h")
    return offer


def _rank(offer: RunPodOffer, flops: float | None) -> tuple[float, float, str, str]:
    """Expected dollars to finish (without FLOPs: of one), dearer where stock is low; then the price,
    then the name."""
    usd = offer.price_usd_per_h / offer.flops_per_s if flops is None else offer.dollars(flops)
    return usd * SCARCITY[offer.stock], offer.price_usd_per_h, offer.gpu_type_id, offer.cloud


def _stock(gpu_type: GpuType, data_center_ids: Sequence[str]) -> Stock:
    """The best of the data centers that will do. A word that is new counts as the scarcest, and so does
    a catalog that was not asked about stock."""
    levels: list[Stock | str | None] = [gpu_type.availability]
    if data_center_ids and gpu_type.availability is not None:
        centers = gpu_type.data_centers or ()
        levels = [center.availability for center in centers if center.id in data_center_ids]
    known = [level if isinstance(level, Stock) else Stock.LOW for level in levels]
    return max(known, key=list(Stock).index, default=Stock.NONE)


def _has_cuda(gpu_type: GpuType, least: str | None) -> bool:
    """Whether a host that is free has it. Hosts that report no version are left to the creation, which
    asks for it too."""
    if least is None or not gpu_type.cuda_versions:
        return True
    return any(
        found.available and _numbers(found.version) >= _numbers(least) for found in gpu_type.cuda_versions
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _not_in_catalog(catalog: Sequence[GpuType], settings: RunPodSettings) -> Iterable[Rejection]:
    known = sorted({gpu_type.id for gpu_type in catalog})
    for wanted in settings.gpu_type_ids:
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, n=3)
            reason = f"not in RunPod's catalog; {f'near it is {near}' if near else f'there are {known}'}"
            yield Rejection(name=wanted, reason=reason)
