from __future__ import annotations

import re
from pathlib import Path

import pytest
from standins.task_rows import load_task

from nanochat.data.heldout import (
    SKILLS,
    HeldOutQuestion,
    held_out_questions,
    judge,
    read_held_out,
    write_held_out,
)
from nanochat.data.tasks import TaskContext
from nanochat.data.tasks.spelling import SMALL_WORDS
from nanochat.data.tasks.splits import split_of_pair, split_of_word
from nanochat.recipes import quick


def test_the_fixed_questions_are_as_many_as_promised_and_always_the_same(context: TaskContext) -> None:
    questions = held_out_questions(context)
    again = TaskContext(
        offline_documents=context.documents, corpus_digest="stdlib", identity_path=context.identity_path
    )
    assert questions == held_out_questions(again)
    assert tuple(questions) == SKILLS
    assert len(questions["name"]) == 20
    assert len(questions["sums"]) == 200
    assert len(questions["word_problems"]) == 100
    words = sum(split_of_word(word) == "test" for word in context.words()[:SMALL_WORDS])
    assert len(questions["letter_counts"]) == len(questions["spelling"]) == min(200, words)
    for skill, asked in questions.items():
        assert len(set(asked)) == len(asked), skill
        assert {question.skill for question in asked} == {skill}
    assert all(len(some) <= 3 for some in held_out_questions(context, limit=3).values())


def test_questions_survive_their_file_and_a_wrong_line_is_named(context: TaskContext, tmp_path: Path) -> None:
    questions = held_out_questions(context)
    path = tmp_path / "skills.jsonl"
    assert write_held_out(path, questions) == sum(map(len, questions.values()))
    assert read_held_out(path) == questions
    for line in ("{", "[]", '{"skill": "name"}', '{"skill": "x", "question": "?", "expected": "y"}'):
        path.write_text(line + "\n", "utf-8")
        with pytest.raises(ValueError, match=r"skills\.jsonl:1: "):
            read_held_out(path)


def test_no_held_out_question_occurs_in_the_quick_mixture(context: TaskContext) -> None:
    recipe = quick()
    assert recipe.midtrain is not None
    asked = {
        question.question.casefold() for asked in held_out_questions(context).values() for question in asked
    }
    for ingredient in recipe.midtrain.mixture:
        for row in load_task(ingredient.task, split="train", rows=2_000, seed=42, context=context):
            assert row.messages[0].text.casefold() not in asked


def test_sums_are_one_and_two_digit_additions_of_held_out_pairs(context: TaskContext) -> None:
    digits = set()
    for question in held_out_questions(context)["sums"]:
        a, b = question.expected.split("+")
        assert re.findall(r"\d+", question.question) == [a, b]
        assert split_of_pair(int(a), int(b)) == "test"
        digits.add((len(a), len(b)))
    assert digits == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_letter_counts_quote_a_held_out_word(context: TaskContext) -> None:
    counts = []
    for question in held_out_questions(context)["letter_counts"]:
        match = re.fullmatch(r' "([a-z]+)"\.count\("([a-z])"\)', question.expected)
        assert match
        assert f' "{match[1]}"' in question.question
        assert split_of_word(match[1]) == "test"
        counts.append(match[1].count(match[2]))
    assert {0, 1, 2} <= set(counts)


@pytest.mark.parametrize(
    ("skill", "expected", "text", "calls", "right"),
    [
        ("name", "NanoChat", "My name is NanoChat.", [], True),
        ("name", "NanoChat", "I show how a model is trained.", [], False),
        ("sums", "12+34", "The answer is 46.", ["12+34"], True),
        ("sums", "12+34", "The answer is 46.", [" 12+34 "], True),
        ("sums", "12+34", "The answer is 46.", ["34+12"], False),
        ("sums", "12+34", "46", [], False),
        ("sums", "12+34", "46", ["12+34", "1+1"], False),
        ("letter_counts", ' "tree".count("e")', "The answer is 2.", [' "tree".count("e")'], True),
        ("letter_counts", ' "tree".count("e")', "The answer is 2.", [' "three".count("e")'], False),
        ("spelling", " t r e e", " t r e e", [], True),
        ("spelling", " t r e e", "t r e e\n", [], True),
        ("spelling", " t r e e", " t r e", [], False),
        ("spelling", " t r e e", "tree", [], False),
        ("direct_sums", "43", "43", [], True),
        ("direct_sums", "43", "43", ["40+3"], False),
        ("hand_counts", " a1 b1. The answer is 1.", " a1 b1. The answer is 1.", [], True),
        ("hand_counts", " a1 b1. The answer is 1.", " a1 b0. The answer is 1.", [], False),
    ],
)
def test_the_expression_is_judged_where_there_is_a_call_and_the_whole_answer_where_there_is_none(
    skill: str, expected: str, text: str, calls: list[str], right: bool
) -> None:
    question = HeldOutQuestion(skill, "?", expected)  # type: ignore[arg-type]
    assert judge(question, text=text, calls=calls) is right


def test_the_training_answer_to_a_question_would_be_judged_right(context: TaskContext) -> None:
    """Judging and generating agree on the form of an answer: held-out rows of each generator pass."""
    generators = {
        "sums": "arithmetic",
        "letter_counts": "letter_count_tool",
        "spelling": "simple_spelling_small",
        "word_problems": "word_problems",
        "hand_counts": "letter_count_by_hand",
        "direct_sums": "direct_sums",
    }
    by_expected = {}
    for skill, task in generators.items():
        for row in load_task(task, split="test", rows=3_000, seed=1, context=context):
            content = row.messages[1].content
            calls = [part.text for part in content if not isinstance(part, str) and part.type == "python"]
            text = content if isinstance(content, str) else content[-1].text
            by_expected[skill, calls[0] if calls else text] = (text, calls)
    checked = 0
    for skill, asked in held_out_questions(context).items():
        for question in asked:
            answer = by_expected.get((skill, question.expected))
            if answer:
                assert judge(question, text=answer[0], calls=answer[1])
                checked += 1
    assert checked > 200
