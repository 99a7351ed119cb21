"""Which of RunPod's serverless pools will do for a model."""

from __future__ import annotations

import pytest

from dagster_nanochat.launch.runpod.models import GpuType, PerCloud, Stock
from dagster_nanochat.launch.runpod.pools import (
    Pool,
    choose_pools,
    named_pools,
    pools_of,
    serving_memory_gb,
)
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import named_recipes


def gpu(id: str, pool: str | None, memory: float, usd: float | None, stock: Stock = Stock.HIGH) -> GpuType:
    return GpuType(id=id, pool=pool, memory=memory, price=PerCloud(serverless=usd), availability=stock)


CATALOG = [
    gpu("A", "BIG", 80, 4.0),
    gpu("B", "BIG", 94, 4.5),
    gpu("C", "SMALL", 16, 0.6, Stock.NONE),
    gpu("D", "MIDDLE", 24, 1.1),
    gpu("E", "UNKNOWN", 24, None),
    gpu("F", None, 999, 0.1),
]


def names(pools: list[Pool]) -> list[str]:
    return [pool.name for pool in pools]


def test_a_pool_is_as_large_as_its_smallest_gpu_and_as_dear_as_its_dearest() -> None:
    pools = {pool.name: pool for pool in pools_of(CATALOG)}
    assert list(pools) == ["SMALL", "MIDDLE", "BIG", "UNKNOWN"]
    assert (pools["BIG"].memory_gb, pools["BIG"].usd_per_h) == (80, 4.5)
    assert pools["UNKNOWN"].describe() == "UNKNOWN (24 GB, price not told)"


def test_the_cheapest_that_have_the_memory_are_taken_those_with_a_free_machine_first() -> None:
    pools = pools_of(CATALOG)
    assert names(choose_pools(pools, 10)) == ["MIDDLE", "BIG", "UNKNOWN"]
    assert names(choose_pools(pools, 10, max_usd_per_h=2.0)) == ["MIDDLE", "SMALL"]
    assert names(choose_pools(pools, 40)) == ["BIG"]


def test_what_the_endpoint_has_is_kept_as_long_as_it_does() -> None:
    pools = pools_of(CATALOG)
    assert names(choose_pools(pools, 10, present=("BIG",))) == ["BIG"]
    assert names(choose_pools(pools, 20, present=("SMALL", "BIG"))) == ["MIDDLE", "BIG", "UNKNOWN"]


def test_where_nothing_will_do_it_is_said_what_there_is() -> None:
    pools = pools_of(CATALOG)
    with pytest.raises(
        AttemptFailed, match=r"100 GB of memory; RunPod has SMALL \(16 GB, \$0.60/h\)"
    ) as error:
        choose_pools(pools, 100)
    assert error.value.failure is Failure.BAD_REQUEST
    with pytest.raises(AttemptFailed, match=r"for at most \$0.5/h"):
        choose_pools(pools, 10, max_usd_per_h=0.5)
    assert names(named_pools(pools, ["BIG", "SMALL"])) == ["BIG", "SMALL"]
    with pytest.raises(AttemptFailed, match="no serverless pool HUGE; there are SMALL"):
        named_pools(pools, ["HUGE"])


def test_every_named_model_fits_a_gpu_that_can_be_had() -> None:
    needed = {name: serving_memory_gb(recipe) for name, recipe in named_recipes().items()}
    # Weights of two bytes a parameter, 8 caches, CUDA's own two gigabytes.
    assert needed["quick"] == 3
    assert needed["quick"] < needed["d12"] < needed["d20"] < needed["d32"] <= 24
