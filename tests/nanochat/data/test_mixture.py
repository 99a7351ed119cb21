from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanochat.data.conversations import (
    Conversation,
    ConversationError,
    exchange,
    read_conversations,
    write_conversations,
)
from nanochat.data.mixture import check_mixture, ingredient_digest, write_mixture
from nanochat.data.tasks import TASKS, TaskContext, TaskError
from nanochat.recipes import Ingredient, named_recipes
from nanochat.store.digests import digest_file

SMALL = (
    Ingredient(task="identity", repeat=2),
    Ingredient(task="arithmetic", rows=100),
    Ingredient(task="simple_spelling", rows=50),
)


def mixed(
    mixture: tuple[Ingredient, ...], seed: int, context: TaskContext, folder: Path
) -> list[Conversation]:
    """The conversations of a written training mixture."""
    check_mixture(mixture, context=context)
    write_mixture(folder / "mixed.jsonl", mixture, split="train", seed=seed, context=context)
    return list(read_conversations(folder / "mixed.jsonl"))


def test_a_mixture_holds_every_ingredient_as_often_as_the_recipe_says(
    context: TaskContext, tmp_path: Path
) -> None:
    rows = mixed(SMALL, 1, context, tmp_path)
    counts = Counter(rows)
    identity = mixed(SMALL[:1], 1, context, tmp_path)
    assert len(rows) == len(identity) + 150
    assert all(counts[row] == 2 for row in identity)


def test_the_order_is_shuffled_and_fixed_by_the_seed(context: TaskContext, tmp_path: Path) -> None:
    rows = mixed(SMALL, 1, context, tmp_path)
    assert rows == mixed(SMALL, 1, context, tmp_path)
    assert rows != mixed(SMALL, 2, context, tmp_path)
    kinds = [row.messages[0].text.startswith("Spell the word:") for row in rows]
    assert 0 < sum(kinds[: len(kinds) // 2]) < 50, "spelling is spread over both halves"


def test_the_report_tells_what_the_written_file_holds(context: TaskContext, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    told: list[tuple[str, int]] = []
    report = write_mixture(
        path, SMALL, split="train", seed=1, context=context, progress=lambda *item: told.append(item)
    )
    rows = list(read_conversations(path))
    assert report.rows == len(rows)
    assert report.sha256 == digest_file(path)
    assert report.size_bytes == path.stat().st_size
    assert report.samples == tuple(path.read_text("utf-8").splitlines()[:5])
    assert [(part.task, part.rows, part.repeat, part.asked) for part in report.ingredients] == [
        ("identity", (len(rows) - 150) // 2, 2, None),
        ("arithmetic", 100, 1, 100),
        ("simple_spelling", 50, 1, 50),
    ]
    assert told == [(part.task, part.rows) for part in report.ingredients]
    assert [part.digest for part in report.ingredients] == [
        ingredient_digest(part, context) for part in SMALL
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.jsonl"]
    assert write_mixture(path, SMALL, split="train", seed=1, context=context) == report


def test_validation_takes_a_small_share_of_held_out_rows(context: TaskContext, tmp_path: Path) -> None:
    mixture = (
        *SMALL[:1],
        Ingredient(task="arithmetic", rows=5_000),
        Ingredient(task="simple_spelling", rows=50),
    )
    report = write_mixture(tmp_path / "v.jsonl", mixture, split="validation", seed=1, context=context)
    assert [part.rows for part in report.ingredients] == [0, 100, 20]
    train = {row.messages[0].text for row in mixed(mixture, 1, context, tmp_path)}
    assert not train & {row.messages[0].text for row in read_conversations(tmp_path / "v.jsonl")}


def test_a_users_file_is_mixed_in(context: TaskContext, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    write_conversations(own, [exchange(f"q{index}", f"a{index}") for index in range(10)])
    mixture = (Ingredient(task=f"jsonl:{own}", repeat=3), Ingredient(task="arithmetic", rows=5))
    rows = mixed(mixture, 1, context, tmp_path)
    assert Counter(rows)[exchange("q3", "a3")] == 3
    assert len(rows) == 35
    some = mixed((Ingredient(task=f"jsonl:{own}", rows=4),), 1, context, tmp_path)
    assert len(set(some)) == 4
    moved = own.rename(tmp_path / "moved.jsonl")
    again = mixed((Ingredient(task=f"jsonl:{moved}", rows=4),), 1, context, tmp_path)
    assert again == some, "the rows chosen are the file's, wherever it lies"


def test_a_users_broken_file_is_refused_line_by_line_before_anything_is_made(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    write_conversations(own, [exchange("q", "a")] * 2)
    own.write_text(own.read_text("utf-8") + '{"messages": []}\nnot json\n', "utf-8")
    mixture = (Ingredient(task="arithmetic", rows=3), Ingredient(task=f"jsonl:{own}"))
    with pytest.raises(
        ConversationError, match=r"2 problems(.|\n)*line 3: no messages(.|\n)*line 4: not JSON"
    ):
        check_mixture(mixture, context=TaskContext())
    path = tmp_path / "train.jsonl"
    with pytest.raises(ConversationError):
        write_mixture(path, mixture, split="train", seed=1, context=TaskContext())
    assert not path.exists()


@pytest.mark.parametrize(
    ("ingredient", "reason"),
    [
        (Ingredient(task="jokes", rows=3), "unknown task 'jokes'"),
        (Ingredient(task="arithmetic"), "give its ingredient rows"),
        (Ingredient(task="identity"), "identity conversations are missing"),
        (Ingredient(task="offline_mmlu", rows=3), "task 'offline_mmlu' .*source 'fineweb-edu'.*Take source"),
        (Ingredient(task="docstring_chat", rows=3), "task 'docstring_chat' is made from documentation"),
    ],
)
def test_a_wrong_ingredient_is_named_before_anything_is_generated(
    ingredient: Ingredient, reason: str
) -> None:
    with pytest.raises(TaskError, match=reason):
        check_mixture((ingredient,), context=TaskContext(source="fineweb-edu"))


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("offline_arc_easy", "'offline_arc_easy' is made from documentation, and source 'fineweb-edu'"),
        ("arithmetic", "'arithmetic' has no multiple-choice questions"),
        ("jokes", "unknown task 'jokes'"),
    ],
)
def test_a_task_that_cannot_ask_questions_here_is_named_before_anything_is_generated(
    task: str, reason: str
) -> None:
    with pytest.raises(TaskError, match=reason):
        check_mixture((), context=TaskContext(source="fineweb-edu"), questions=(task,))


def test_a_failing_ingredient_leaves_no_file_behind(tmp_path: Path, identity_file: Path) -> None:
    poor = TaskContext(identity_path=identity_file, corpus_digest="x")
    with pytest.raises(TaskError, match="no offline documents"):
        write_mixture(tmp_path / "train.jsonl", SMALL, split="train", seed=1, context=poor)
    assert list(tmp_path.iterdir()) == []


def test_unusable_rows_of_a_dataset_are_counted_and_the_first_ones_named(
    make_hub: Callable[[dict[str, list[dict[str, Any]]]], Any], tmp_path: Path
) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "user", "content": "a"}]}
    hub = make_hub(
        {
            f"HuggingFaceTB/smol-smoltalk/default/{split}": [good] * 5 + [bad] * 7
            for split in ("train", "test")
        }
    )
    report = write_mixture(
        tmp_path / "t.jsonl",
        (Ingredient(task="smoltalk"),),
        split="train",
        seed=1,
        context=TaskContext(hub=hub),
    )
    (part,) = report.ingredients
    assert (part.rows, part.skipped, len(part.problems)) == (5, 7, 5)
    assert part.problems[0].startswith("HuggingFaceTB/smol-smoltalk/train/5: message 1: the last")


def test_the_digest_of_an_ingredient_changes_with_its_inputs_and_with_nothing_else(
    context: TaskContext, tmp_path: Path
) -> None:
    other = replace(context, corpus_digest="another corpus")
    identity = Ingredient(task="identity")
    spelling = Ingredient(task="simple_spelling", rows=5)
    sums = Ingredient(task="arithmetic", rows=5)
    assert ingredient_digest(spelling, context) != ingredient_digest(spelling, other)
    assert (
        ingredient_digest(sums, context)
        == ingredient_digest(sums, other)
        == ingredient_digest(sums, TaskContext())
    )
    assert ingredient_digest(identity, context) == ingredient_digest(identity, other)
    assert ingredient_digest(replace(sums, rows=9, repeat=2), context) == ingredient_digest(sums, context)

    own = tmp_path / "own.jsonl"
    write_conversations(own, [exchange("q", "a")])
    moved = tmp_path / "moved.jsonl"
    write_conversations(moved, [exchange("q", "a")])
    before = ingredient_digest(Ingredient(task=f"jsonl:{own}"), context)
    assert ingredient_digest(Ingredient(task=f"jsonl:{moved}"), context) == before
    write_conversations(own, [exchange("q", "b")])
    assert ingredient_digest(Ingredient(task=f"jsonl:{own}"), context) != before

    edited = tmp_path / "identity.jsonl"
    write_conversations(edited, [exchange("q", "a")])
    assert ingredient_digest(identity, replace(context, identity_path=edited)) != ingredient_digest(
        identity, context
    )


def test_a_digest_needs_the_corpus_to_be_known(context: TaskContext) -> None:
    with pytest.raises(TaskError, match="not ingested yet"):
        ingredient_digest(Ingredient(task="docstring_chat", rows=5), replace(context, corpus_digest=None))


def test_every_task_that_a_named_recipe_mixes_or_asks_exists() -> None:
    for recipe in named_recipes().values():
        assert recipe.midtrain is not None
        assert recipe.sft is not None
        for ingredient in (*recipe.midtrain.mixture, *recipe.sft.mixture):
            assert ingredient.task in TASKS
        for name in (recipe.sft.mmlu_task, recipe.sft.arc_easy_task):
            assert TASKS[name].questions is not None


@pytest.mark.needs_data
def test_the_mixture_of_a_large_recipe_is_built_from_the_hubs_datasets(
    real_hub: Any, context: TaskContext, tmp_path: Path
) -> None:
    recipe = named_recipes()["d4"]
    assert recipe.sft is not None
    full = replace(context, hub=real_hub)
    report = write_mixture(tmp_path / "sft.jsonl", recipe.sft.mixture, split="train", seed=42, context=full)
    rows = {part.task: part.rows for part in report.ingredients}
    assert rows["arc_easy"] == 2_251
    assert rows["arc_challenge"] == 1_119
    assert rows["gsm8k"] == 7_473
    assert rows["smoltalk"] == 10_000
    assert rows["spelling_bee"] == 300
    assert sum(part.skipped for part in report.ingredients) == 0
    assert sum(1 for _ in read_conversations(tmp_path / "sft.jsonl")) == report.rows
