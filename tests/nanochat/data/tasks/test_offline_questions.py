from __future__ import annotations

import re
from collections import Counter

import pytest
from standins.task_rows import load_task

from nanochat.data.tasks import TaskContext, TaskError, load_questions
from nanochat.data.tasks.docstring_chat import documented, first_sentence
from nanochat.data.tasks.splits import split_of_module

TASKS = ["offline_mmlu", "offline_arc_easy"]


@pytest.mark.parametrize("name", TASKS)
def test_one_choice_is_a_word_of_the_quoted_text_and_no_other_is(name: str, context: TaskContext) -> None:
    questions = load_questions(name, split="test", context=context)
    assert len(questions) >= 20
    assert len({question.id for question in questions}) == len(questions)
    for question in questions:
        right = question.choices[question.letters.index(question.answer)]
        words = re.findall(r"[a-z]+", question.question)
        assert right in words
        assert sum(choice in question.question.lower() for choice in question.choices) == 1
        assert len(set(question.choices)) == len(question.choices)


def test_mmlu_has_four_choices_and_a_subject_and_arc_easy_three_and_none(context: TaskContext) -> None:
    mmlu = load_questions("offline_mmlu", split="test", context=context)
    arc = load_questions("offline_arc_easy", split="test", context=context)
    assert {question.letters for question in mmlu} == {("A", "B", "C", "D")}
    assert {question.subject for question in mmlu} == {"python"}
    assert {question.letters for question in arc} == {("A", "B", "C")}
    assert {question.subject for question in arc} == {None}


@pytest.mark.parametrize("name", TASKS)
def test_questions_for_testing_quote_modules_that_training_never_quotes(
    name: str, context: TaskContext
) -> None:
    modules = {}
    for split in ("train", "test"):
        questions = load_questions(name, split=split, context=context)
        modules[split] = {question.id.split("/")[3].split(".")[0] for question in questions}
        assert {split_of_module(module) for module in modules[split]} == {split}
    assert not modules["train"] & modules["test"]


@pytest.mark.parametrize("name", TASKS)
def test_a_sentence_that_stands_in_several_modules_is_quoted_in_one_split(
    name: str, context: TaskContext
) -> None:
    sentences: dict[str, list[str]] = {}
    for document in context.documents():
        where = f"{document.module}.{document.name}" if document.name else document.module
        sentence = first_sentence(document.text)
        if sentence:
            sentences.setdefault(where, []).append(sentence.casefold())
    standing = {split: set[str]() for split in ("train", "validation", "test")}
    for split in standing:
        for _, sentence in documented(context, split):
            standing[split].add(sentence.casefold())
    assert standing["train"] & standing["test"], "without any the test says nothing"
    for question in load_questions(name, split="test", context=context):
        where = question.id.split("/", 3)[3]
        assert not set(sentences[where]) <= standing["train"] | standing["validation"]


@pytest.mark.parametrize("name", TASKS)
def test_neither_a_letter_nor_the_commonest_words_give_the_answer_away(
    name: str, context: TaskContext
) -> None:
    questions = load_questions(name, split="train", context=context)
    letters = Counter(question.answer for question in questions)
    expected = len(questions) / len(questions[0].letters)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in letters.values())
    rank = {word: index for index, word in enumerate(context.words())}
    by_frequency = sum(
        question.answer
        == min(zip(question.choices, question.letters, strict=True), key=lambda c: rank[c[0]])[1]
        for question in questions
    )
    assert by_frequency < expected + 5 * expected**0.5


def test_questions_are_always_the_same_and_a_limit_takes_a_fixed_sample(context: TaskContext) -> None:
    questions = load_questions("offline_mmlu", split="test", context=context)
    assert questions == load_questions("offline_mmlu", split="test", context=context)
    some = load_questions("offline_mmlu", split="test", context=context, limit=10)
    assert len(some) == 10
    assert some == load_questions("offline_mmlu", split="test", context=context, limit=10)
    assert set(some) <= set(questions)
    assert some != questions[:10]
    assert len(load_questions("offline_mmlu", split="test", context=context, limit=10**6)) == len(questions)


def test_a_corpus_without_short_sentences_is_said_to_have_none(context: TaskContext) -> None:
    poor = TaskContext(offline_documents=lambda: context.documents()[:3], corpus_digest="x")
    with pytest.raises(TaskError, match="offline documents have"):
        load_task("offline_mmlu", split="test", rows=3, seed=1, context=poor)


def test_a_task_without_questions_says_which_have_them(context: TaskContext) -> None:
    with pytest.raises(TaskError, match="'arithmetic' has no multiple-choice questions; these have: mmlu"):
        load_questions("arithmetic", split="test", context=context)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return the sum of two\nnumbers. And more.", "Return the sum of two numbers."),
        ("Read a file, e.g. (a.b) here:\n\n    >>> x", "Read a file, e.g. (a.b) here."),
        ("Return the sum of the numbers", "Return the sum of the numbers."),
        ("Too short.", None),
        (">>> this is a session of python", None),
        ("x" * 300, None),
    ],
)
def test_the_first_sentence_of_a_documentation(text: str, sentence: str | None) -> None:
    assert first_sentence(text) == sentence
