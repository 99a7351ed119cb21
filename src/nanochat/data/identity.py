"""Digests of the data that a stage reads: what enters its fingerprint, and which files it gets."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.data.mixture import ingredient_digest
from nanochat.data.shards import ShardError, ShardRecord, require_shards
from nanochat.data.sources import get_source
from nanochat.data.stage_data import corpus_digest, task_context
from nanochat.data.tasks import TaskError
from nanochat.data.tasks.context import TextNeeded
from nanochat.recipes import Ingredient, Recipe, Sft
from nanochat.store import ObjectStore
from nanochat.store.receipts import FileRef, Receipt


class DataNeeded(Exception):
    """Data that a stage reads is not in the store yet: `needs` says what, one line each, and how to
    get it."""

    def __init__(self, needs: Sequence[str]) -> None:
        super().__init__("; ".join(needs))
        self.needs = tuple(dict.fromkeys(needs))


def _records(store: ObjectStore, recipe: Recipe, shards: tuple[str, ...]) -> list[ShardRecord]:
    try:
        return require_shards(store, get_source(recipe.data.source), shards, mode="reference")
    except ShardError as error:
        raise DataNeeded([str(error)]) from error


def shard_digests(
    store: ObjectStore, recipe: Recipe, *, count: int, validation: bool = False
) -> dict[str, str]:
    """sha256 by shard of the recipe's first `count` training shards, and of the validation shard.

    Raises DataNeeded naming the shards that are not ingested.
    """
    source = get_source(recipe.data.source)
    train = source.training_shards()[:count]
    digests = {record.shard: record.sha256 for record in _records(store, recipe, train)}
    if validation:
        (held_out,) = _records(store, recipe, (source.validation_shard(),))
        digests[f"validation {held_out.shard}"] = held_out.sha256
    return digests


def shard_files(store: ObjectStore, recipe: Recipe) -> tuple[tuple[FileRef, ...], FileRef]:
    """The recipe's training shards in order, and its validation shard, as stored files."""
    source = get_source(recipe.data.source)
    train = _records(store, recipe, source.training_shards()[: recipe.data.shards])
    (held_out,) = _records(store, recipe, (source.validation_shard(),))
    return tuple(record.file for record in train), held_out.file


def conversation_files(receipt: Receipt) -> dict[str, FileRef]:
    """A data stage's outputs by their role: ``train``, ``validation``, ``mmlu``, ``arc_easy``."""
    return {file.name.removesuffix(".jsonl"): file for file in receipt.outputs}


def conversation_digests(
    store: ObjectStore, recipe: Recipe, stage: str, *, fetch: bool = False
) -> dict[str, str]:
    """Digest of what each ingredient of the stage's mixture is made from. Raises DataNeeded.

    fetch: bring datasets of the hub that are missing (raises HubError where it cannot).
    """
    section = recipe.midtrain if stage == "midtrain" else recipe.sft
    assert section is not None
    digest: str | None = None
    missing_text: tuple[str, ...] = ()
    try:
        digest = corpus_digest(shard_digests(store, recipe, count=recipe.data.shards))
    except DataNeeded as error:
        missing_text = error.needs
    context = task_context(store, recipe, corpus_digest=digest, fetch=fetch)
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
        digests["skills"] = digest or ""
    if needs:
        raise DataNeeded(needs)
    return digests
