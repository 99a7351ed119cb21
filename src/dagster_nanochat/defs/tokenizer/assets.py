"""The tokenizer: the reduce step over the shards' word counts."""

import tempfile
import time
from pathlib import Path

import dagster as dg

from dagster_nanochat.console import progress_told
from dagster_nanochat.defs.tokenizer.compression import bytes_per_token
from dagster_nanochat.guards import StageConfig
from dagster_nanochat.inprocess import Made, build_stage
from dagster_nanochat.partitions import counts_to_models, model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe
from dagster_nanochat.stage_assets import built_result
from dagster_nanochat.views import data_folder, show_files
from nanochat.data.counts import ensure_counts
from nanochat.data.sources import get_source
from nanochat.machine import peak_memory_bytes
from nanochat.tokenizer_training import train_tokenizer


@dg.asset(
    partitions_def=model_partitions,
    group_name="tokenizer",
    deps=[dg.AssetDep("shard_word_counts", partition_mapping=counts_to_models)],
    kinds={"rust"},
    tags={"stage": "tokenizer"},
    code_version="1",
)
def tokenizer_training(
    context: dg.AssetExecutionContext, config: StageConfig, store: StoreResource
) -> dg.MaterializeResult:
    """The byte-pair vocabulary, trained on the shards that the recipe names.

    Models with the same tokenizer section and shards share one: the second is fresh at once.
    """
    recipe = required_recipe(context)
    opened = store.open()

    def make(folder: Path) -> Made:
        source = get_source(recipe.data.source)
        shards = source.training_shards()[: recipe.tokenizer.shards]
        counts = [ensure_counts(opened, source.name, shard, recipe.tokenizer) for shard in shards]
        context.log.info(f"tokenizer: {recipe.tokenizer.vocab_size:,} ids from {len(shards)} shards")
        with tempfile.TemporaryDirectory(prefix="nanochat-counts-") as scratch:
            paths = [
                opened.local_path(count.key) or opened.fetch(count.key, Path(scratch) / shard)
                for count, shard in zip(counts, shards, strict=True)
            ]
            start = time.monotonic()
            with progress_told(context, "tokenizer", "merges") as tell:
                tokenizer = train_tokenizer(
                    recipe.tokenizer,
                    paths,
                    provenance={"source": source.name, "shards": list(shards)},
                    progress=tell,
                )
            seconds = time.monotonic() - start
        trained_on = tokenizer.provenance["trained_on"]
        path = folder / "tokenizer.json"
        tokenizer.save(path)
        ratio, shard = bytes_per_token(opened, source, tokenizer)
        context.log.info(f"tokenizer: {ratio:.3f} bytes a token on {shard}, merged in {seconds:.1f} s")
        return Made(
            files=(path,),
            metrics={
                "vocab_size": float(tokenizer.vocab_size),
                "words": float(trained_on["words"]),
                "unique_words": float(trained_on["unique_words"]),
                "text_bytes": float(trained_on["bytes"]),
                "bytes_per_token": round(ratio, 4),
                "merge_seconds": round(seconds, 2),
                "peak_memory_bytes": float(peak_memory_bytes()),
            },
            tables={"compression": [{"shard": shard, "bytes_per_token": ratio}]},
        )

    built = build_stage(context, "tokenizer", recipe, opened, config, make)
    folder = show_files(opened, built.receipt.outputs, data_folder(opened) / "tokenizer" / recipe.name)
    return built_result(context, built, model=recipe.name, store=store, extra={"folder": str(folder)})
