"""Which model or shards a run is for: required by name, never guessed."""

from __future__ import annotations

import dagster as dg

from dagster_nanochat.partitions import recipe_book
from nanochat.recipes import Recipe


def required_recipe(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> Recipe:
    """The recipe of the run's model partition. Raises dg.Failure where there is none.

    Dagster starts a partitioned job without a partition and lets it go green; we do not.
    """
    book = recipe_book()
    if not context.has_partition_key:
        raise dg.Failure(
            "this asset is built for one model: launch it with a partition, e.g. `--partition quick` "
            f"(models: {', '.join(book.recipes)})",
            allow_retries=False,
        )
    try:
        return book[context.partition_key]
    except KeyError as error:
        raise dg.Failure(error.args[0], allow_retries=False) from error


def required_shards(context: dg.AssetExecutionContext) -> list[str]:
    """The shard partitions of the run: one key or a range. Raises dg.Failure where there is none."""
    if not (context.has_partition_key or context.has_partition_key_range):
        raise dg.Failure(
            "this asset is built shard by shard: launch it with a partition or a range, e.g. "
            "`--partition-range offline_00000...offline_00007`",
            allow_retries=False,
        )
    return list(context.partition_keys)
