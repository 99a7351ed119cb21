"""Are the stored shards still what was recorded?"""

import dagster as dg

from dagster_nanochat.partitions import shard_partitions, shard_sources
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.shard_checks import CHECK_NAME, shard_evaluation
from nanochat.data.shards import read_record


@dg.asset_check(asset="training_files", partitions_def=shard_partitions, name=CHECK_NAME)
def shards_verified(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """Reads a shard's bytes again and compares them with the recorded digest.

    Ingestion evaluates it for every shard as it lands; run alone it looks for later damage.
    """
    if not context.has_partition_key:
        raise dg.Failure("shards_verified looks at one shard: choose a partition", allow_retries=False)
    shard = context.partition_key
    opened = store.open()
    record = read_record(opened, shard_sources()[shard].name, shard)
    if record is None:
        return dg.AssetCheckResult(passed=False, description=f"{shard} is not ingested")
    evaluation = shard_evaluation(opened, record)
    return dg.AssetCheckResult(
        passed=evaluation.passed, description=evaluation.description, metadata=dict(evaluation.metadata)
    )
