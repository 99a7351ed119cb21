"""What the two conversation-data assets have in common."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg

from dagster_nanochat.guards import StageConfig
from dagster_nanochat.inprocess import Made, build_stage
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe
from dagster_nanochat.stage_assets import built_result, switched_off
from nanochat.data.conversations import ConversationError, read_conversations
from nanochat.data.hub import HubError
from nanochat.data.identity import DataNeeded, conversation_digests, mixture_context
from nanochat.data.shards import ShardError
from nanochat.data.sources import SourceError
from nanochat.data.stage_data import count_characters, write_stage_data
from nanochat.data.tasks import TaskError
from nanochat.plan import token_count_key
from nanochat.recipes import Recipe
from nanochat.stages import resolve
from nanochat.store import ObjectStore
from nanochat.store.local import local_copy
from nanochat.store.receipts import Receipt, current_receipt
from nanochat.tokenizer import Tokenizer


def conversation_data_result(
    context: dg.AssetExecutionContext, stage: str, config: StageConfig, store: StoreResource
) -> dg.MaterializeResult:
    """Materialize a mixture: build it or find it fresh."""
    recipe = required_recipe(context)
    opened = store.open()
    section = recipe.midtrain if stage == "midtrain_data" else recipe.sft
    if section is None or stage not in resolve(recipe, opened):
        return switched_off(context, stage, recipe.name)

    try:
        # The stage's identity is made of its datasets' digests, so they are fetched first.
        conversation_digests(opened, recipe, stage.removesuffix("_data"), fetch=True)
    except HubError as error:
        raise dg.Failure(f"{stage} of {recipe.name}: {error}") from error
    except DataNeeded as error:
        raise dg.Failure(f"{stage} of {recipe.name} needs {error}", allow_retries=False) from error

    def make(folder: Path) -> Made:
        tasks, _ = mixture_context(opened, recipe, fetch=True)
        try:
            data = write_stage_data(
                recipe, section, tasks, folder, lambda line: context.log.info(f"{stage}: {line}")
            )
        except (TaskError, ConversationError, ShardError, SourceError, HubError) as error:
            raise dg.Failure(f"{stage} of {recipe.name}: {error}", allow_retries=False) from error
        rows = [
            {
                "task": part.task,
                "rows": part.rows,
                "repeat": part.repeat,
                "skipped": part.skipped,
                "digest": part.digest[:12],
            }
            for part in data.train.ingredients
        ]
        samples = [{"conversation": sample[:600]} for sample in data.train.samples]
        return Made(
            files=data.files,
            metrics={
                "rows": float(data.train.rows),
                "validation_rows": float(data.validation.rows),
                "characters": float(count_characters(data.files[0])),
                **{f"{name}_questions": float(count) for name, count in data.questions.items()},
            },
            tables={"mixture": rows, "sample_rows": samples},
            warnings=tuple(
                f"{part.task}: {problem}" for part in data.train.ingredients for problem in part.problems
            ),
        )

    built = build_stage(context, stage, recipe, opened, config, make)
    tokens = _tokens(opened, recipe, built.receipt)
    extra = {} if tokens is None else {"tokens": tokens}
    return built_result(context, built, model=recipe.name, store=store, extra=extra)


def _tokens(store: ObjectStore, recipe: Recipe, receipt: Receipt) -> int | None:
    """Tokens of the training conversations for this model's tokenizer; counted once and kept.

    They are no part of the data's own receipt: models with other tokenizers share the data.
    """
    tokenizer = current_receipt(store, recipe.name, "tokenizer")
    if tokenizer is None:
        return None
    train = receipt.output("train.jsonl")
    key = token_count_key(train.key, tokenizer.fingerprint)
    if store.head(key) is None:
        encoder = Tokenizer.load(local_copy(store, tokenizer.output("tokenizer.json")))
        conversations = read_conversations(local_copy(store, train))
        count = sum(len(encoder.render(conversation).ids) for conversation in conversations)
        store.put(key, json.dumps({"tokens": count}).encode())
    return int(json.loads(store.get(key))["tokens"])
