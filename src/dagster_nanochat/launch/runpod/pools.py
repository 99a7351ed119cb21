"""Which GPUs an endpoint's workers may have: RunPod's serverless pools, sifted by memory and price."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from dagster_nanochat.launch.runpod.models import GpuType, Stock
from nanochat import costs
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import Recipe, parameters

GB = 1_000_000_000
# Answers that a worker gives at the same time at most, each with a cache as long as the context: what
# NANOCHAT_MAX_ROWS of `nanochat.serving.worker` is unless somebody says otherwise.
ROWS = 8
# CUDA's own context and the library's workspaces on a GPU, and what fragmentation wastes of the rest.
CUDA_BYTES, FRAGMENTATION = 2 * GB, 1.2
# So many may be chosen: where one has no machine free, the next may.
MOST_POOLS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """GPUs of a kind. memory_gb: of the smallest. usd_per_h: of the dearest; None where it is not told."""

    name: str
    memory_gb: float
    usd_per_h: float | None
    stock: Stock

    def describe(self) -> str:
        price = "price not told" if self.usd_per_h is None else f"${self.usd_per_h:.2f}/h"
        return f"{self.name} ({self.memory_gb:g} GB, {price})"


def serving_memory_gb(recipe: Recipe) -> int:
    """GB of GPU memory that a worker needs: weights and caches in bfloat16."""
    model = recipe.model
    weights = costs.BYTES_BFLOAT16 * parameters(model, recipe.tokenizer.vocab_size)
    caches = ROWS * model.context * costs.kv_bytes_per_token(model)
    return math.ceil((CUDA_BYTES + FRAGMENTATION * (weights + caches)) / GB)


def pools_of(catalog: Iterable[GpuType]) -> list[Pool]:
    """Every pool of the catalog, the cheapest first."""
    members: dict[str, list[GpuType]] = {}
    for gpu_type in catalog:
        if gpu_type.pool:
            members.setdefault(gpu_type.pool, []).append(gpu_type)
    pools = [
        Pool(
            name=name,
            memory_gb=min(gpu_type.memory for gpu_type in kinds),
            usd_per_h=max((kind.price.serverless for kind in kinds if kind.price.serverless), default=None),
            stock=max((_stock(gpu_type) for gpu_type in kinds), key=list(Stock).index),
        )
        for name, kinds in members.items()
    ]
    return sorted(pools, key=lambda pool: (pool.usd_per_h or math.inf, pool.memory_gb, pool.name))


def choose_pools(
    pools: Sequence[Pool],
    memory_gb: float,
    *,
    max_usd_per_h: float | None = None,
    present: Sequence[str] = (),
) -> list[Pool]:
    """Those that will do: the endpoint's `present` ones as long as they do, so that a price that moves makes
    no release, else the cheapest, those with a free machine first. Raises AttemptFailed."""
    fitting = [
        pool
        for pool in pools
        if pool.memory_gb >= memory_gb
        and (max_usd_per_h is None or (pool.usd_per_h is not None and pool.usd_per_h <= max_usd_per_h))
    ]
    if not fitting:
        dear = "" if max_usd_per_h is None else f" for at most ${max_usd_per_h:g}/h (max_price_usd_per_h)"
        raise AttemptFailed(
            Failure.BAD_REQUEST,
            f"no serverless pool has GPUs with {memory_gb:g} GB of memory{dear}; RunPod has "
            f"{', '.join(pool.describe() for pool in pools) or 'none'}",
        )
    kept = [pool for pool in fitting if pool.name in present]
    if present and len(kept) == len(present):
        return kept
    return sorted(fitting, key=lambda pool: pool.stock is Stock.NONE)[:MOST_POOLS]


def named_pools(pools: Sequence[Pool], names: Sequence[str]) -> list[Pool]:
    """Raises AttemptFailed for a name that is none."""
    known = {pool.name: pool for pool in pools}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AttemptFailed(
            Failure.BAD_REQUEST,
            f"gpu_pools: RunPod has no serverless pool {', '.join(unknown)}; there are {', '.join(known)}",
        )
    return [known[name] for name in names]


def _stock(gpu_type: GpuType) -> Stock:
    """A word that is new counts as the scarcest."""
    if gpu_type.availability is None:
        return Stock.NONE
    return gpu_type.availability if isinstance(gpu_type.availability, Stock) else Stock.LOW
