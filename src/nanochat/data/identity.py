"""Digests of the data that a stage reads: what enters its fingerprint, and which files it gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from nanochat.data.mixture import ingredient_digest
from nanochat.data.shards import ShardError, ShardRecord, require_shards
from nanochat.data.sources import get_source
from nanochat.data.stage_data import corpus_digest, task_context
from nanochat.data.tasks import TaskContext, TaskError
from nanochat.data.tasks.context import TextNeeded
from nanochat.recipes import Ingredient, Recipe, Sft
from nanochat.store import ObjectStore
from nanochat.store.receipts import FileRef, Receipt


class DataNeeded(Exception):
    """Data that a stage reads is not in the store yet: `needs` says what, one line each, and how to
    get it."""

    def __init__(self, needs: Sequence[str]) -> None:
        self.needs = tuple(dict.fromkeys(needs))
        super().__init__("; ".join(self.needs))


def _records(store: ObjectStore, recipe: Recipe, *, count: int, validation: bool) -> list[ShardRecord]:
    source = get_source(recipe.data.source)
    shards = source.training_shards()[:count]
    if validation:
        shards += (source.validation_shard(),)
    try:
        return require_shards(store, source, shards, mode="reference")
    except ShardError as error:
        raise DataNeeded([str(error)]) from error


def shard_digests(
    store: ObjectStore, recipe: Recipe, *, count: int, validation: bool = False
) -> dict[str, str]:
    """sha256 by shard of the recipe's first `count` training shards, and of the validation shard.

    Raises DataNeeded naming the shards that are not ingested.
    """
    records = _records(store, recipe, count=count, validation=validation)
    held_out = records.pop() if validation else None
    digests = {record.shard: record.sha256 for record in records}
    if held_out:
        digests[f"validation {held_out.shard}"] = held_out.sha256
    return digests


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """A recipe's training shards in order, and its validation shard. urls: by key, the hub's address of
    those whose bytes the store does not hold."""

    train: tuple[FileRef, ...]
    validation: FileRef
    urls: Mapping[str, str]


def shard_files(store: ObjectStore, recipe: Recipe) -> ShardFiles:
    """The text that the recipe's base model is trained and measured on.

    Raises DataNeeded naming the shards that are not ingested.
    """
    records = _records(store, recipe, count=recipe.data.shards, validation=True)
    *train, held_out = (record.file for record in records)
    urls = {record.key: record.url for record in records if record.mode == "reference"}
    return ShardFiles(train=tuple(train), validation=held_out, urls=urls)


def conversation_files(receipt: Receipt) -> dict[str, FileRef]:
    """A data stage's outputs by their role: ``train``, ``validation``, ``mmlu``, ``arc_easy``."""
    return {file.name.removesuffix(".jsonl"): file for file in receipt.outputs}


def mixture_context(
    store: ObjectStore, recipe: Recipe, *, fetch: bool
) -> tuple[TaskContext, tuple[str, ...]]:
    """What the recipe's tasks may read, and what is missing of its training text (not every mixture
    reads that)."""
    digest: str | None = None
    missing: tuple[str, ...] = ()
    try:
        digest = corpus_digest(shard_digests(store, recipe, count=recipe.data.shards))
    except DataNeeded as error:
        missing = error.needs
    return task_context(store, recipe, corpus_digest=digest, fetch=fetch), missing


def conversation_digests(
    store: ObjectStore, recipe: Recipe, stage: str, *, fetch: bool = False
) -> dict[str, str]:
    """Digest of what each ingredient of the stage's mixture is made from. Raises DataNeeded.

    fetch: bring datasets of the hub that are missing (raises HubError where it cannot).
    """
    section = recipe.midtrain if stage == "midtrain" else recipe.sft
    assert section is not None
    context, missing_text = mixture_context(store, recipe, fetch=fetch)
    tasks = list(section.mixture)
    if isinstance(section, Sft):
        asked = (section.mmlu_task, section.arc_easy_task)
        tasks += [Ingredient(task=task) for task in asked if task is not None]
    digests: dict[str, str] = {}
    needs: list[str] = []
    for number, ingredient in enumerate(tasks):
        try:
            digests[f"{number:02d} {ingredient.task.split(':')[0]}"] = ingredient_digest(ingredient, context)
        except TextNeeded:
            needs += missing_text
        except TaskError as error:
            needs.append(str(error))
    if isinstance(section, Sft) and section.skills:
        needs += missing_text
        digests["skills"] = context.corpus_digest or ""
    if needs:
        raise DataNeeded(needs)
    return digests
