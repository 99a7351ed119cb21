"""Offers: what is sifted out and why, and what comes first."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from standins.runpod_api import Specification

from dagster_nanochat.launch.base import Offer, Request
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings
from dagster_nanochat.launch.runpod.models import GpuType, Stock
from dagster_nanochat.launch.runpod.offers import (
    START_H,
    NoOffer,
    find_offers,
    rank_offers,
    sift,
)
from nanochat.failures import AttemptFailed, Failure
from nanochat.machine import GPU_SHARE, UNKNOWN_GPU_FLOPS

H100, H200, L4 = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA L4"
ONE = Request(gpus=1, min_gpu_memory_gib=24)
EIGHT = Request(gpus=8, min_gpu_memory_gib=80)
# d20's base stage: about 11.2 billion tokens at 3.5 GFLOP.
FLOPS = 4e19


def _line(gpu_id: str, usd: float = 1.0, **fields: Any) -> GpuType:
    return GpuType.model_validate(_document(gpu_id, usd, **fields))


def _document(gpu_id: str, usd: float = 1.0, **fields: Any) -> dict[str, Any]:
    document = {
        "id": gpu_id,
        "name": gpu_id.removeprefix("NVIDIA "),
        "pool": None,
        "manufacturer": "NVIDIA",
        "memory": 80,
        "secure": True,
        "community": True,
        "price": {"secure": usd, "community": usd},
        "maxCount": {"secure": 8, "community": 4},
        "availability": "HIGH",
        "dataCenters": [{"id": "US-KS-2", "name": "Kansas", "availability": "HIGH"}],
        "cudaVersions": [{"version": "13.2", "available": True}],
    }
    return {**document, **fields}


def _names(lines: list[GpuType], settings: RunPodSettings | None = None, **options: Any) -> list[str]:
    offers = rank_offers(lines, ONE, settings or RunPodSettings(), options.pop("flops", FLOPS), **options)
    return [offer.gpu_type_id for offer in offers]


def test_an_offer_is_the_whole_machine() -> None:
    [offer] = rank_offers([_line(H100, 3.0)], EIGHT, RunPodSettings(), FLOPS, disk_gb=73)
    assert isinstance(offer, Offer)
    assert offer.name == "8 x NVIDIA H100 80GB HBM3 (secure cloud)"
    assert offer.disk_usd_per_h == pytest.approx(0.01)
    assert offer.price_usd_per_h == pytest.approx(24.01)
    assert offer.flops_per_s == pytest.approx(8 * 989e12 * GPU_SHARE)
    hours = FLOPS / (8 * 989e12 * GPU_SHARE) / 3600
    assert offer.hours(FLOPS) == pytest.approx(hours + START_H)
    assert offer.dollars(FLOPS) == pytest.approx((hours + START_H) * 24.01)
    assert (offer.cloud, offer.memory_gib, offer.stock) == ("SECURE", 80, Stock.HIGH)


def test_settings_come_before_the_request() -> None:
    settings = RunPodSettings(gpu_count=2, min_memory_gib=40, container_disk_gb=730, volume_disk_gb=730)
    [offer] = rank_offers([_line(H100, memory=48)], EIGHT, settings, FLOPS, disk_gb=5)
    assert offer.gpu_count == 2
    assert offer.disk_usd_per_h == pytest.approx(0.2)


def test_several_machines_are_priced_and_timed_together() -> None:
    [offer] = rank_offers([_line(H100, 3.0)], EIGHT, RunPodSettings(nodes=2), FLOPS, disk_gb=73)
    assert offer.name == "2 x 8 x NVIDIA H100 80GB HBM3 (secure cloud)"
    assert offer.price_usd_per_h == pytest.approx(48.02)
    assert offer.flops_per_s == pytest.approx(16 * 989e12 * GPU_SHARE)


def test_the_cheapest_to_finish_comes_first_and_not_the_cheapest_hour() -> None:
    # An H100 is eight times an L4.
    assert _names([_line(L4, 0.5), _line(H100, 3.0)]) == [H100, L4]
    assert _names([_line(L4, 0.3), _line(H100, 3.0)]) == [L4, H100]


def test_a_small_job_goes_to_the_cheapest_hour_since_starting_costs_too() -> None:
    assert _names([_line(H100, 3.0), _line(L4, 0.5)], flops=1e15) == [L4, H100]


def test_without_flops_the_cheapest_flop_comes_first() -> None:
    lines = [_line(L4, 0.5), _line(H100, 3.0)]
    offers = rank_offers(lines, ONE, RunPodSettings())
    assert [offer.gpu_type_id for offer in offers] == [H100, L4]


def test_scarce_machines_must_be_cheaper_to_come_first() -> None:
    def first(low_usd: float) -> str:
        return _names([_line(H100, low_usd, availability="LOW"), _line(H200, 3.0)])[0]

    assert first(2.9) == H200
    assert first(2.5) == H100
    # The preference is not in the estimate.
    [low] = rank_offers([_line(H100, 3.0, availability="LOW")], ONE, RunPodSettings(), FLOPS)
    [high] = rank_offers([_line(H100, 3.0)], ONE, RunPodSettings(), FLOPS)
    assert low.dollars(FLOPS) == high.dollars(FLOPS)


def test_a_gpu_that_is_not_known_counts_as_the_slowest_that_is() -> None:
    [offer] = rank_offers([_line("NVIDIA Z900")], ONE, RunPodSettings(), FLOPS)
    assert offer.flops_per_s == pytest.approx(GPU_SHARE * UNKNOWN_GPU_FLOPS)


def test_the_order_does_not_depend_on_the_catalogs() -> None:
    lines = [_line(f"NVIDIA X{n}") for n in range(6)]
    lines += [line.model_copy(update={"asked_cloud": "COMMUNITY"}) for line in lines]
    orders = set()
    for seed in range(5):
        random.Random(seed).shuffle(lines)
        offers = rank_offers(lines, ONE, RunPodSettings(cloud_type="ALL"), FLOPS)
        orders.add(tuple((offer.gpu_type_id, offer.cloud) for offer in offers))
    assert len(orders) == 1


REJECTED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"memory": 16}, {}, "less than 24 GiB"),
    ({"memory": 48}, {"min_memory_gib": 80}, "less than 80 GiB"),
    ({}, {"gpu_count": 9}, "no machine has 9"),
    ({"usd": 3.0}, {"gpu_count": 2, "max_price_usd_per_h": 5.99}, "max_price_usd_per_h, $5.99"),
    ({"secure": False}, {}, "not offered on this cloud"),
    ({"usd": 0.0}, {}, "not offered on this cloud"),
    ({"price": {"secure": None, "community": 1}}, {}, "not offered on this cloud"),
    ({"manufacturer": "AMD"}, {}, "not an NVIDIA GPU"),
    ({"gpu_id": "Tesla V100-SXM2-32GB"}, {}, "too old"),
    ({"availability": "NONE"}, {}, "none free"),
    ({}, {"data_center_ids": ["EU-RO-1"]}, "none free in EU-RO-1"),
    ({"dataCenters": None}, {"data_center_ids": ["US-KS-2"]}, "none free in US-KS-2"),
    ({}, {"min_cuda_version": "13.11"}, "none free with CUDA 13.11"),
    (
        {"cudaVersions": [{"version": "12.8", "available": True}, {"version": "13.0", "available": False}]},
        {"min_cuda_version": "13.0"},
        "none free with CUDA 13.0",
    ),
    ({"gpu_id": L4}, {"deadline_h": 10}, "takes longer than deadline_h, 10 h"),
]


@pytest.mark.parametrize(("line", "said", "reason"), REJECTED)
def test_what_will_not_do_is_rejected_with_the_reason(
    line: dict[str, Any], said: dict[str, Any], reason: str
) -> None:
    fields = {"gpu_id": H100, **line}
    offers, rejections = sift([_line(**fields)], ONE, RunPodSettings(**said), FLOPS)
    assert offers == []
    assert [reason in rejection.reason for rejection in rejections] == [True]
    with pytest.raises(NoOffer) as caught:
        rank_offers([_line(**fields)], ONE, RunPodSettings(**said), FLOPS)
    assert reason in str(caught.value)
    assert fields["gpu_id"] in str(caught.value)
    # Waiting helps where something is full, and only there.
    assert caught.value.failure is (Failure.NO_CAPACITY if "free" in reason else Failure.BAD_REQUEST)
    assert isinstance(caught.value, AttemptFailed)


ACCEPTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"usd": 3.0}, {"gpu_count": 2, "max_price_usd_per_h": 6.0}),
    ({}, {"data_center_ids": ["EU-RO-1", "US-KS-2"]}),
    ({}, {"min_cuda_version": "12.8"}),
    ({}, {"min_cuda_version": "12.2"}),
    ({"cudaVersions": None}, {"min_cuda_version": "12.8"}),
    ({"availability": "PLENTY"}, {}),
    ({"availability": None}, {"data_center_ids": ["US-KS-2"]}),
    ({"manufacturer": None}, {}),
    ({}, {"gpu_count": 8}),
]


@pytest.mark.parametrize(("line", "said"), ACCEPTED)
def test_what_will_do_is_offered(line: dict[str, Any], said: dict[str, Any]) -> None:
    assert len(rank_offers([_line(H100, **line)], ONE, RunPodSettings(**said), FLOPS)) == 1


def test_the_stock_is_that_of_the_data_centers_that_will_do() -> None:
    centers = [
        {"id": "US-KS-2", "name": "", "availability": "LOW"},
        {"id": "EU-RO-1", "name": "", "availability": "HIGH"},
        {"id": "US-TX-3", "name": "", "availability": "MEDIUM"},
    ]
    settings = RunPodSettings(data_center_ids=("US-KS-2", "US-TX-3"))
    [offer] = rank_offers([_line(H100, dataCenters=centers)], ONE, settings, FLOPS)
    assert offer.stock is Stock.MEDIUM
    assert offer.data_center_ids == ("US-KS-2", "US-TX-3")


def test_a_line_counts_for_the_cloud_it_was_asked_for() -> None:
    line = _line(H100, price={"secure": 3.0, "community": 2.0})
    community = line.model_copy(update={"asked_cloud": "COMMUNITY", "availability": Stock.LOW})
    offers = rank_offers([line, community], ONE, RunPodSettings(cloud_type="ALL"), FLOPS)
    assert [(offer.cloud, offer.price_usd_per_h, offer.stock) for offer in offers] == [
        ("COMMUNITY", 2.0, Stock.LOW),
        ("SECURE", 3.0, Stock.HIGH),
    ]
    with pytest.raises(NoOffer, match=r"no machine has 8 of them: 8 x .* \(community cloud\)"):
        rank_offers([community], EIGHT, RunPodSettings(), FLOPS)


def test_only_gpu_types_that_are_named_count_and_a_wrong_name_is_told() -> None:
    lines = [_line(H100), _line(H200), _line(L4)]
    settings = RunPodSettings(gpu_type_ids=(L4, H100))
    assert sorted(_names(lines, settings)) == [H100, L4]
    assert sift(lines, ONE, settings, FLOPS)[1] == []
    with pytest.raises(NoOffer, match=r"NVIDIA H100 80GB HBM3.*: NVIDIA H100 80GB"):
        _names(lines, RunPodSettings(gpu_type_ids=("NVIDIA H100 80GB",)))
    with pytest.raises(NoOffer, match=r"there are .*NVIDIA L4"):
        _names(lines, RunPodSettings(gpu_type_ids=("A100",)))


def test_reasons_are_told_once_for_all_that_they_hold_for() -> None:
    lines = [_line("NVIDIA A", memory=8), _line("NVIDIA B", memory=8), _line("NVIDIA C", availability="NONE")]
    with pytest.raises(NoOffer) as caught:
        rank_offers(lines, ONE, RunPodSettings(), FLOPS)
    assert str(caught.value).count("less than 24 GiB") == 1
    assert caught.value.failure is Failure.NO_CAPACITY
    with pytest.raises(NoOffer, match="catalog is empty"):
        rank_offers([], ONE, RunPodSettings(), FLOPS)


def test_an_offer_is_a_line_of_a_table() -> None:
    offers = rank_offers([_line(L4, 0.5, availability="LOW"), _line(H100, 3.0)], ONE, RunPodSettings(), FLOPS)
    rows = [offer.row(FLOPS) for offer in offers]
    assert [row["stock"] for row in rows] == ["HIGH", "LOW"]
    assert rows[0] == {
        "offer": "1 x NVIDIA H100 80GB HBM3 (secure cloud)",
        "usd_per_h": 3.0,
        "hours": pytest.approx(28.29, abs=0.01),
        "usd": pytest.approx(84.86, abs=0.01),
        "stock": "HIGH",
    }
    assert {offers[0].row(None)[name] for name in ("hours", "usd")} == {None}


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({}, [("POD", "SECURE", "8")]),
        ({"cloud_type": "ALL", "gpu_count": 4}, [("POD", "SECURE", "4"), ("POD", "COMMUNITY", "4")]),
        ({"nodes": 2, "cloud_type": "ALL"}, [("CLUSTER", "SECURE", "8")]),
    ],
)
def test_the_catalog_is_asked_about_what_is_wanted(
    said: dict[str, Any],
    asked: list[tuple[str, str, str]],
    client_of: Callable[..., RunPodClient],
    specification: Specification,
) -> None:
    document = _document(H100)
    assert specification.schema_errors("GpuType", document) == []
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        specification.check(request)
        params = request.url.params
        seen.append((params["product"], params["cloud"], params["count"]))
        return httpx.Response(200, json={"gpus": [document]})

    offers = find_offers(client_of(handle), EIGHT, RunPodSettings(**said), FLOPS)
    assert seen == asked
    assert [offer.cloud for offer in offers] == [cloud for _, cloud, _ in sorted(asked)]
