"""Whether a stored shard is what its record says, as a check evaluation of its own partition."""

from __future__ import annotations

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluation

from nanochat.data.shards import ShardRecord, verify_shard
from nanochat.store import ObjectStore

CHECK_NAME = "shards_verified"


def shard_evaluation(store: ObjectStore, record: ShardRecord) -> AssetCheckEvaluation:
    """The evaluation that ingestion logs for a shard: Dagster has no per-partition result for a run
    over a range of partitions, so it is logged as an event with its partition."""
    problem = verify_shard(store, record)
    return AssetCheckEvaluation(
        asset_key=dg.AssetKey("training_files"),
        check_name=CHECK_NAME,
        passed=problem is None,
        description=problem or f"sha256 {record.sha256[:12]}… of {record.size_bytes:,} bytes",
        partition=record.shard,
        metadata={"sha256": record.sha256, "bytes": record.size_bytes},
    )
