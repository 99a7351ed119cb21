"""External assets that show a running stage's metrics, one a model and stage."""

import dagster as dg

from dagster_nanochat.metadata import live_metrics_key
from dagster_nanochat.partitions import recipe_book
from nanochat.stages import STAGES, TRAINING_STAGES


@dg.definitions
def live_metrics() -> dg.Definitions:
    return dg.Definitions(
        assets=[
            dg.AssetSpec(
                key=live_metrics_key(recipe.name, stage),
                group_name="live_metrics",
                description=f"Loss, rate and evaluations of {recipe.name}'s {stage} while it runs.",
            )
            for recipe in recipe_book().recipes.values()
            for stage in TRAINING_STAGES
            if STAGES[stage].enabled(recipe)
        ]
    )
