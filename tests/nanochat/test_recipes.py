"""Recipes: derived from depth, validated by field, extended by a user's file."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nanochat.recipes import (
    Recipe,
    RecipeError,
    from_depth,
    load_recipes,
    named_recipes,
    parameters,
    quick,
)


def test_the_named_recipes_are_the_published_sizes() -> None:
    recipes = named_recipes()
    assert list(recipes) == ["quick", "d4", "d12", "d20", "d24", "d26", "d32"]
    sizes = {name: parameters(recipe.model, recipe.tokenizer.vocab_size) for name, recipe in recipes.items()}
    # d20's 560,988,160 and 21,400 steps are published with nanochat's October 2025 run.
    assert sizes["d20"] == 560_988_160
    assert recipes["d20"].base.steps == 21_400
    # Not "1280 wide, 10M parameters", as the published guides have it.
    assert (recipes["d12"].model.width, sizes["d12"]) == (768, 185_597_952)


@pytest.mark.parametrize(("name", "least"), [("d20", 240), ("d26", 450)])
def test_shards_are_never_below_the_published_ones(name: str, least: int) -> None:
    assert named_recipes()[name].data.shards >= least


def test_d4_has_a_small_vocabulary_and_eight_shards() -> None:
    recipe = named_recipes()["d4"]
    assert (recipe.tokenizer.vocab_size, recipe.data.shards) == (10_000, 8)


def test_a_recipe_survives_json() -> None:
    for recipe in named_recipes().values():
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_no_recipe_holds_a_sentinel() -> None:
    def numbers(value: object) -> list[float]:
        if isinstance(value, dict):
            return [number for item in value.values() for number in numbers(item)]
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []

    for recipe in named_recipes().values():
        assert all(number >= 0 for number in numbers(recipe.to_json()))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"base": {"steps": -1, "batch_tokens": 4096}}, "base.steps"),
        ({"tokenizer": {"vocab_size": 12, "shards": 1}}, "tokenizer.vocab_size"),
        ({"model": {"depth": 2, "width": 100, "heads": 3, "kv_heads": 3, "context": 64}}, "width 100"),
        ({"midtrian": None}, "midtrian"),
        ({"data": {"source": "offline", "shards": 2}}, "tokenizer.shards (8) is more than data.shards (2)"),
    ],
)
def test_a_wrong_recipe_is_refused_naming_recipe_and_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.from_json({**quick().to_json(), **change})
    assert "'quick'" in str(error.value)
    assert field in str(error.value)


def test_a_users_file_adds_recipes_and_a_wrong_one_is_left_out(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from nanochat.recipes import from_depth, quick\n"
        "RECIPES = [from_depth(6, name='mine'), {**quick().to_json(), 'name': 'bad', 'base': {}}]\n"
    )
    book = load_recipes(path)
    assert "mine" in book.recipes
    assert "d20" in book.recipes
    assert "bad" not in book.recipes
    (error,) = book.errors
    assert "'bad'" in error
    assert "base.steps" in error


def test_a_users_file_that_does_not_run_is_reported_with_its_line(tmp_path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nRECIPES = [undefined_name]\n")
    book = load_recipes(path)
    assert list(book.recipes) == list(named_recipes())
    assert "broken.py:2" in book.errors[0]
    assert "undefined_name" in book.errors[0]


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"unknown model 'd99'.*quick, d4"):
        load_recipes()["d99"]


def test_depth_zero_makes_no_recipe() -> None:
    with pytest.raises(RecipeError, match="depth"):
        from_depth(0)


def test_a_stage_can_be_switched_off() -> None:
    recipe = quick().replace(sft=None)
    assert recipe.sft is None
    with pytest.raises(Exception, match="sft needs midtrain"):
        dataclasses.replace(quick(), midtrain=None)
