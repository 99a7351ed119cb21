from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from standins.task_rows import load_task

from nanochat.data.conversations import Conversation, Part, dumps, problem
from nanochat.data.parquet import iter_documents
from nanochat.data.tasks import SPLITS, TASKS, TaskContext, TaskError
from nanochat.data.tasks.splits import Split, split_of_module, split_of_pair, split_of_word
from nanochat.recipes import quick

GENERATORS = [name for name, task in TASKS.items() if not task.finite]
WORD_TASKS = [
    "simple_spelling",
    "spelling_bee",
    "simple_spelling_small",
    "letter_count_tool",
    "letter_count_by_hand",
]


def rows_of(
    name: str, context: TaskContext, *, split: Split = "train", rows: int = 400, seed: int = 7
) -> list[Conversation]:
    return load_task(name, split=split, rows=rows, seed=seed, context=context)


def parts_of(conversation: Conversation) -> tuple[Part, ...]:
    content = conversation.messages[-1].content
    assert not isinstance(content, str)
    return content


def spelled_or_counted(conversation: Conversation) -> set[str]:
    """The word that an answer takes apart: spelled out, or handed to the calculator."""
    answer = conversation.messages[-1].text
    calls = re.findall(r"['\"]([a-z]+)['\"]\.count", answer) or re.findall(r"^([a-z]+):", answer)
    return set(calls) or {"".join(re.findall(r" ([a-z])(?=[ \d]|$)", answer.split(".")[0]))}


def question_of(conversation: Conversation) -> str:
    return conversation.messages[0].text


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_gives_what_it_is_asked_for_and_always_the_same(name: str, context: TaskContext) -> None:
    rows = rows_of(name, context)
    assert len(rows) == 400
    assert [problem(row) for row in rows] == [None] * 400
    assert rows == rows_of(name, context)
    assert rows != rows_of(name, context, seed=8)


@pytest.mark.parametrize("name", [n for n in GENERATORS if n not in ("identity_small", "docstring_chat")])
def test_a_generators_splits_share_no_question(name: str, context: TaskContext) -> None:
    questions = {
        split: {question_of(row).casefold() for row in rows_of(name, context, split=split, rows=1_500)}
        for split in SPLITS
    }
    assert all(questions.values())
    assert not questions["train"] & questions["validation"]
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & questions["test"]


def test_every_task_of_the_quick_recipe_exists_and_fits_its_rows(context: TaskContext) -> None:
    recipe = quick()
    assert recipe.midtrain is not None
    assert recipe.sft is not None
    for ingredient in (*recipe.midtrain.mixture, *recipe.sft.mixture):
        for row in rows_of(ingredient.task, context, rows=200):
            assert len(" ".join(message.text for message in row.messages)) < 500, row


def test_rows_are_the_same_in_another_process() -> None:
    code = (
        "from nanochat.data.tasks import find_task, TaskContext\n"
        "from nanochat.data.conversations import dumps\n"
        "print([dumps(c) for n in ('arithmetic','word_problems','direct_sums')"
        " for c in find_task(n).generate(TaskContext(), 'train', 20, 7)])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "5"},
    )
    here = [
        dumps(row)
        for name in ("arithmetic", "word_problems", "direct_sums")
        for row in rows_of(name, TaskContext(), rows=20)
    ]
    assert run.stdout.strip() == str(here)


@pytest.mark.parametrize("name", WORD_TASKS)
def test_held_out_words_are_never_spelled_or_counted_in_training(name: str, context: TaskContext) -> None:
    words = {word for word in context.words() if split_of_word(word) != "train"}
    assert words
    for row in rows_of(name, context, rows=3_000):
        (word,) = spelled_or_counted(row)
        assert word in question_of(row).lower()
        assert word not in words


def test_a_pair_of_numbers_is_held_out_in_both_orders_and_for_every_operation(context: TaskContext) -> None:
    assert all(split_of_pair(a, b) == split_of_pair(b, a) for a in range(100) for b in range(100))
    shares = [split_of_pair(a, b) for a in range(100) for b in range(a + 1)]
    assert 0.03 < shares.count("test") / len(shares) < 0.07
    for name in ("arithmetic", "word_problems"):
        for row in rows_of(name, context, rows=3_000):
            a, b = map(int, re.findall(r"\d+", parts_of(row)[0].text))
            assert split_of_pair(a, b) == "train"


def test_a_sum_calls_the_calculator_and_says_what_it_gave(context: TaskContext) -> None:
    operators = set()
    for row in rows_of("arithmetic", context, rows=2_000):
        call, output, text = parts_of(row)
        assert (call.type, output.type, text.type) == ("python", "python_output", "text")
        match = re.fullmatch(r"(\d{1,2})([+*-])(\d{1,2})", call.text)
        assert match
        a, operator, b = int(match[1]), match[2], int(match[3])
        assert int(output.text) == {"+": a + b, "-": a - b, "*": a * b}[operator]
        assert text.text == f"The answer is {output.text}."
        assert re.findall(r"\d+", question_of(row)) == [match[1], match[3]]
        operators.add(operator)
    assert operators == {"+", "-", "*"}


def test_a_word_problem_calls_the_calculator_with_the_numbers_of_its_story(context: TaskContext) -> None:
    for row in rows_of("word_problems", context, rows=1_000):
        call, output, _ = parts_of(row)
        a, operator, b = re.fullmatch(r"(\d+)([+*-])(\d+)", call.text).groups()  # type: ignore[union-attr]
        assert sorted(re.findall(r"\d+", question_of(row))) == sorted([a, b])
        assert (
            int(output.text) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        )
        assert int(output.text) >= 0


def test_a_sum_in_the_head_is_answered_with_the_number_alone(context: TaskContext) -> None:
    for row in rows_of("direct_sums", context):
        a, b = map(int, re.findall(r"\d+", question_of(row)))
        assert row.messages[1].content == str(a + b)
        assert a < 50
        assert b < 10


def test_a_letter_count_copies_the_quoted_word_into_its_call(context: TaskContext) -> None:
    quoted = 0
    for row in rows_of("letter_count_tool", context, rows=2_000):
        call, output, text = parts_of(row)
        match = re.fullmatch(r' "([a-z]+)"\.count\("([a-z])"\)', call.text)
        assert match
        assert int(output.text) == match[1].count(match[2])
        assert text.text == f"The answer is {output.text}."
        assert match[1] in question_of(row)
        quoted += f' "{match[1]}"' in question_of(row)
    assert quoted / 2_000 > 0.7


def test_a_count_by_hand_carries_the_count_behind_every_letter(context: TaskContext) -> None:
    for row in rows_of("letter_count_by_hand", context, rows=1_000):
        answer = row.messages[1].text
        trace = re.findall(r" ([a-z])(\d+)", answer.split(".")[0])
        word = "".join(letter for letter, _ in trace)
        assert word in question_of(row)
        final = int(re.fullmatch(r".*The answer is (\d+)\.", answer).group(1))  # type: ignore[union-attr]
        assert final == int(trace[-1][1])
        rises = {
            letter
            for index, (letter, count) in enumerate(trace)
            if int(count) > int(trace[index - 1][1] if index else 0)
        }
        assert len(rises) <= 1
        assert all(word.count(letter) == final for letter in rises)


def test_spelling_has_a_published_form_and_a_small_one(context: TaskContext) -> None:
    for row in rows_of("simple_spelling", context):
        word = question_of(row).removeprefix("Spell the word: ")
        assert row.messages[1].content == f"{word}:{','.join(word)}"
    for row in rows_of("simple_spelling_small", context):
        assert "".join(row.messages[1].text.split()) in question_of(row).lower()
        assert re.fullmatch(r"( [a-z]){3,15}", row.messages[1].text)


def test_the_spelling_bee_counts_by_hand_then_with_the_calculator_and_ends_with_the_number(
    context: TaskContext,
) -> None:
    for row in rows_of("spelling_bee", context):
        by_hand, call, output, end = parts_of(row)
        word, letter = re.fullmatch(r"'([a-z]+)'\.count\('([a-z])'\)", call.text).groups()  # type: ignore[union-attr]
        count = word.count(letter)
        assert output.text == str(count)
        assert end.text.endswith(f"#### {count}")
        assert f"{word}:{','.join(word)}\n" in by_hand.text
        assert f"makes {count}." in by_hand.text
        assert [line for line in by_hand.text.splitlines() if re.match(r"\d+:[a-z]", line)] == [
            f"{index}:{character}"
            + (f" found, count={word[:index].count(letter)}" if character == letter else "")
            for index, character in enumerate(word, start=1)
        ]
        assert word in question_of(row).lower()


def test_documentation_is_asked_for_by_name_and_held_out_by_module(context: TaskContext) -> None:
    by_sentence: dict[str, set[str]] = {}
    for document in context.documents():
        by_sentence.setdefault(" ".join(document.text.split())[:40], set()).add(
            split_of_module(document.module)
        )
    for row in rows_of("docstring_chat", context, rows=1_000):
        answer = row.messages[1].text
        assert answer[-1] in ".!?"
        assert len(answer) <= 165
        sources = [
            splits
            for start, splits in by_sentence.items()
            if answer[:-1].startswith(start[: len(answer) - 1])
        ]
        assert any("train" in splits for splits in sources)


def test_words_come_from_the_training_text_the_commonest_first() -> None:
    texts = ["the cat the cat the dog's", "the_cat cat it's 3cats path/dog a.dog Dog dog dog, dog", "xy " * 9]
    words = TaskContext(texts=lambda: texts, min_word_count=3).words()
    assert words == ("cat", "dog", "the")
    assert TaskContext(texts=lambda: texts, min_word_count=3, max_word_chars=25).words() == ("the",)


def test_words_are_taken_from_a_shard_with_null_rows_too(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"text": ["the cat", None, "the cat", "", "the cat"]}), path)
    assert TaskContext(texts=lambda: iter_documents([path])).words() == ("cat", "the")


def test_a_text_without_words_is_said_to_be_so() -> None:
    with pytest.raises(TaskError, match="no words"):
        load_task(
            "simple_spelling", split="train", rows=1, seed=1, context=TaskContext(texts=lambda: ["1 2 3"])
        )
    assert split_of_word("the") == "train"
    few = TaskContext(texts=lambda: ["the the the"])
    with pytest.raises(TaskError, match=r"too few words \(1\) for split 'test'"):
        load_task("simple_spelling", split="test", rows=1, seed=1, context=few)


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("jokes", 3, "unknown task 'jokes'. Known tasks: smoltalk, "),
        ("docstring_chat", 3, "no offline documents here"),
        ("gsm8k", 3, "task 'gsm8k' reads a dataset of the hub"),
    ],
)
def test_what_a_task_lacks_is_named(name: str, rows: int | None, reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        load_task(name, split="train", rows=rows, seed=1, context=TaskContext())
