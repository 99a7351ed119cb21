"""The recipes there are: those the project ships, and the user's.

A user's own recipes live in a Python file that ``NANOCHAT_RECIPES`` names::

    from nanochat.recipes import from_depth

    RECIPES = [from_depth(6, name="mine", vocab_size=16_384)]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanochat.recipes import Recipe, RecipeError, explain, named_recipes

RECIPES_ENV = "NANOCHAT_RECIPES"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeBook:
    """All usable recipes by name, and the errors of those that were left out."""

    recipes: Mapping[str, Recipe]
    errors: tuple[str, ...]

    def __getitem__(self, name: str) -> Recipe:
        if name not in self.recipes:
            known = ", ".join(self.recipes)
            broken = f" Left out with errors: {' | '.join(self.errors)}" if self.errors else ""
            raise KeyError(f"unknown model {name!r}. Known models: {known}.{broken}")
        return self.recipes[name]


def load_recipes(path: str | os.PathLike[str] | None = None) -> RecipeBook:
    """The shipped recipes and those of the user's file (`path`, else ``NANOCHAT_RECIPES``).

    The file is Python and defines ``RECIPES``, an iterable of `Recipe` or of mappings in the JSON
    form of one. A wrong entry is left out and reported; the others load.
    """
    recipes = named_recipes()
    errors: list[str] = []
    location = path or os.environ.get(RECIPES_ENV)
    if location:
        for entry in _entries(Path(location), errors):
            try:
                recipe = entry if isinstance(entry, Recipe) else Recipe.from_json(entry)
            except (RecipeError, TypeError) as error:
                errors.append(f"{location}: {error}")
                continue
            if recipe.name in recipes:
                errors.append(f"{location}: recipe {recipe.name!r}: name: is taken; choose another")
                continue
            recipes[recipe.name] = recipe
    return RecipeBook(recipes=recipes, errors=tuple(errors))


def _entries(location: Path, errors: list[str]) -> list[Any]:
    try:
        if location.suffix == ".json":
            return list(json.loads(location.read_text(encoding="utf-8")))
        spec = importlib.util.spec_from_file_location("nanochat_user_recipes", location)
        if spec is None or spec.loader is None:
            raise ImportError("not a Python file (expected a name ending in .py)")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return list(module.RECIPES)
    except Exception as error:  # the user's file may raise anything; it is reported, not swallowed
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(location)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None)
        reason = explain(error) if isinstance(error, ValidationError) else str(error)
        where = f"{location}:{line}" if line else str(location)
        errors.append(f"{where}: the recipe file could not be read: {type(error).__name__}: {reason}")
        return []
