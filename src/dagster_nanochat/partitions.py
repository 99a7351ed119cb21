"""The two kinds of partition, and the lineage between them.

shard: every enabled source's training shards, in order. model: the recipes. A model's shards are
found through its recipe, so the lineage from shards to models is a static mapping.
"""

from __future__ import annotations

import functools
import logging

import dagster as dg

from nanochat.data.sources import Source, enabled_sources, get_source, load_sources
from nanochat.recipe_book import RecipeBook, load_recipes
from nanochat.recipes import Recipe


@functools.cache
def recipe_book() -> RecipeBook:
    """The recipes of this code location: shipped ones and the user's. A recipe whose source is
    unknown, or too small for it, is left out with an error like any other wrong one."""
    book = load_recipes()
    usable: dict[str, Recipe] = {}
    errors = list(book.errors)
    for name, recipe in book.recipes.items():
        try:
            available = len(get_source(recipe.data.source).training_shards())
        except ValueError as error:
            errors.append(f"recipe {name!r}: data.source: {error}")
            continue
        if recipe.data.shards > available:
            errors.append(
                f"recipe {name!r}: data.shards: {recipe.data.shards} asked for, source "
                f"{recipe.data.source!r} has {available} training shards"
            )
            continue
        usable[name] = recipe
    return RecipeBook(recipes=usable, errors=tuple(errors))


@functools.cache
def shard_sources() -> dict[str, Source]:
    """Shard key → its source, for every enabled source, in partition order."""
    return {shard: source for source in enabled_sources() for shard in source.training_shards()}


def _warn_of_what_is_left_out() -> None:
    """A source or a recipe that is left out has no partition: nothing else would tell when it is looked
    for in the UI or asked for by `dg launch`."""
    for error in (*load_sources().errors, *recipe_book().errors):
        logging.getLogger(__name__).warning("left out: %s", error)


_warn_of_what_is_left_out()
shard_partitions = dg.StaticPartitionsDefinition(list(shard_sources()))
model_partitions = dg.StaticPartitionsDefinition(list(recipe_book().recipes))


def _shards_to_models(*, tokenizer_only: bool) -> dg.StaticPartitionMapping:
    mapping: dict[str, list[str]] = {}
    known = shard_sources()
    for name, recipe in recipe_book().recipes.items():
        count = recipe.tokenizer.shards if tokenizer_only else recipe.data.shards
        for shard in get_source(recipe.data.source).training_shards()[:count]:
            if shard in known:
                mapping.setdefault(shard, []).append(name)
    return dg.StaticPartitionMapping(mapping)


shards_to_models = _shards_to_models(tokenizer_only=False)
counts_to_models = _shards_to_models(tokenizer_only=True)
