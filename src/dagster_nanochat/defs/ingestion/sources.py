"""The sources of text, as external assets in front of the shards."""

import dagster as dg

from nanochat.data.sources import enabled_sources


def source_key(source: str) -> dg.AssetKey:
    """The external asset that stands for a source of text."""
    return dg.AssetKey(["source", source])


@dg.definitions
def sources() -> dg.Definitions:
    return dg.Definitions(
        assets=[
            dg.AssetSpec(
                source_key(source.name),
                group_name="ingestion",
                description=f"{len(source.training_shards()):,} training shards, pinned at a revision when "
                "first used.",
            )
            for source in enabled_sources()
        ]
    )
