"""Jobs: ingestion over shards, and everything else over one model."""

import dagster as dg

from dagster_nanochat.guards import MAX_HOURS_TAG, MAX_USD_TAG
from dagster_nanochat.partitions import model_partitions, recipe_book, shard_partitions

# The export is launched by itself: it needs a package that training does not.
_MODEL_ASSETS = dg.AssetSelection.all() - dg.AssetSelection.assets(
    "training_files", "shard_word_counts", "nanochat_training_image", "huggingface_export"
)

_DEPLOYMENT = dg.AssetSelection.assets("nanochat_serverless_image", "serverless_endpoint", "chat_inference")

# The steps only watch other processes, and the default executor takes 3 s to start each one.
_EXECUTOR = dg.in_process_executor


@dg.definitions
def jobs() -> dg.Definitions:
    model_assets = _MODEL_ASSETS.materializable()
    return dg.Definitions(
        executor=_EXECUTOR,
        schedules=[
            # Off until somebody switches it on: it looks at every stage, and builds only what is not fresh.
            dg.ScheduleDefinition(
                name="refresh_quick",
                job_name="nanochat_quick",
                cron_schedule="0 4 * * 0",
                default_status=dg.DefaultScheduleStatus.STOPPED,
            )
        ],
        jobs=[
            dg.define_asset_job(
                "ingest_shards",
                selection=dg.AssetSelection.assets("training_files", "shard_word_counts").without_checks(),
                partitions_def=shard_partitions,
                executor_def=_EXECUTOR,
                description="Fetch, verify and count shards; a range of partitions is one run.",
            ),
            dg.define_asset_job(
                "model_training",
                selection=model_assets,
                partitions_def=model_partitions,
                executor_def=_EXECUTOR,
                description="Everything for one model, from tokenizer to chat.",
            ),
            dg.define_asset_job(
                "deploy_model",
                selection=_DEPLOYMENT,
                partitions_def=model_partitions,
                executor_def=_EXECUTOR,
                description="Put a model that is trained on its endpoint, and ask it a question.",
            ),
            *(
                dg.define_asset_job(
                    name,
                    selection=model_assets,
                    partitions_def=model_partitions,
                    executor_def=_EXECUTOR,
                    tags={
                        "dagster/partition": model,
                        MAX_HOURS_TAG: str(max_hours),
                        MAX_USD_TAG: str(max_usd),
                    },
                    description=f"model_training for {model}; each stage is capped at {max_hours:g} h on "
                    f"this machine, at ${max_usd:g} on a rented one.",
                )
                for name, model, max_hours, max_usd in (
                    ("nanochat_quick", "quick", 1.0, 1.0),
                    ("nanochat_1_dollar", "d4", 24.0, 1.0),
                    ("nanochat_10_dollar", "d12", 1.0, 10.0),
                    ("nanochat_100_dollar", "d20", 1.0, 100.0),
                )
                if model in recipe_book().recipes
            ),
        ],
    )
