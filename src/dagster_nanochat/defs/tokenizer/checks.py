"""Is the tokenizer a good one? File and round trip block what follows; the others warn."""

from pathlib import Path

import dagster as dg

from dagster_nanochat.defs.tokenizer.assets import tokenizer_training
from dagster_nanochat.defs.tokenizer.compression import bytes_per_token
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe
from nanochat.data.sources import get_source
from nanochat.evaluation import tokenizer_quality as quality
from nanochat.recipes import Recipe
from nanochat.store import ObjectStore
from nanochat.store.local import local_copy
from nanochat.store.receipts import current_receipt
from nanochat.tokenizer import Tokenizer


def _tokenizer_path(store: ObjectStore, recipe: Recipe) -> Path:
    receipt = current_receipt(store, recipe.name, "tokenizer")
    if receipt is None:
        raise dg.Failure(
            f"{recipe.name} has no tokenizer to check: materialize tokenizer_training first",
            allow_retries=False,
        )
    return local_copy(store, receipt.output("tokenizer.json"))


def _tokenizer(store: ObjectStore, recipe: Recipe) -> Tokenizer:
    return Tokenizer.load(_tokenizer_path(store, recipe))


@dg.asset_check(asset=tokenizer_training, partitions_def=model_partitions, blocking=True)
def tokenizer_file_valid(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """tokenizer.json loads: every byte is there, no id twice, the nine special tokens where they belong."""
    recipe = required_recipe(context)
    found = quality.file_valid(_tokenizer_path(store.open(), recipe))
    return dg.AssetCheckResult(
        passed=found.passes, description=found.problem, metadata={"ids": found.vocab_size or 0}
    )


@dg.asset_check(asset=tokenizer_training, partitions_def=model_partitions, blocking=True)
def tokenizer_encode_decode(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """What is encoded decodes to itself, and typed special tokens stay text."""
    recipe = required_recipe(context)
    found = quality.encode_decode(_tokenizer(store.open(), recipe))
    return dg.AssetCheckResult(
        passed=found.passes,
        description="; ".join(found.failures) or None,
        metadata={"texts": found.tried, "failures": len(found.failures)},
    )


@dg.asset_check(asset=tokenizer_training, partitions_def=model_partitions)
def tokenizer_compression_ratio(
    context: dg.AssetCheckExecutionContext, store: StoreResource
) -> dg.AssetCheckResult:
    """Bytes a token on the model's own validation text (its training text where that is not here)."""
    recipe = required_recipe(context)
    opened = store.open()
    ratio, shard = bytes_per_token(opened, get_source(recipe.data.source), _tokenizer(opened, recipe))
    least = recipe.evaluation.min_compression_ratio
    return dg.AssetCheckResult(
        passed=ratio >= least,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{ratio:.3f} bytes a token on {shard}, at least {least:g} wanted",
        metadata={"bytes_per_token": ratio, "wanted": least, "shard": shard},
    )


def _versus_gpt2(domain: quality.Domain) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=tokenizer_training,
        partitions_def=model_partitions,
        name=f"tokenizer_vs_gpt2_{domain}",
        description=f"Tokens on a fixed {domain} text beside GPT-2's (and GPT-4's, for comparison only): "
        "positive is more tokens, so worse.",
    )
    def check(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
        recipe = required_recipe(context)
        comparison = quality.versus_gpt2(_tokenizer(store.open(), recipe), domain)
        most = recipe.evaluation.max_extra_tokens_vs_gpt2
        return dg.AssetCheckResult(
            passed=comparison.passes(most),
            severity=dg.AssetCheckSeverity.WARN,
            description=f"{comparison.relative_difference:+.1%} tokens beside GPT-2's, "
            f"at most {most:+.0%} wanted",
            metadata={
                "tokens": comparison.ours,
                "gpt2_tokens": comparison.gpt2,
                "gpt4_tokens": comparison.gpt4,
                "bytes": comparison.size_bytes,
                "text_sha256": quality.evaluation_texts()[domain].sha256,
                "difference": comparison.relative_difference,
            },
        )

    return check


tokenizer_vs_gpt2_news = _versus_gpt2("news")
tokenizer_vs_gpt2_korean = _versus_gpt2("korean")
tokenizer_vs_gpt2_code = _versus_gpt2("code")
tokenizer_vs_gpt2_science = _versus_gpt2("science")
