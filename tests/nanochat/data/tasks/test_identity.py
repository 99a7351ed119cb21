from __future__ import annotations

from pathlib import Path

import pytest
from standins.task_rows import load_task

from nanochat.data.conversations import problem, read_conversations, validate_conversations
from nanochat.data.tasks import TaskContext, TaskError
from nanochat.data.tasks.identity import is_about_the_name
from nanochat.data.tasks.name_paraphrases import NAME_PARAPHRASES, holds_held_out_question, normalise


def test_the_projects_identity_file_is_valid_varied_and_short(identity_file: Path) -> None:
    assert validate_conversations(identity_file) == []
    conversations = list(read_conversations(identity_file))
    assert len(conversations) >= 150
    assert len(set(conversations)) == len(conversations)
    assert sum(len(conversation.messages) > 2 for conversation in conversations) >= 20
    longest = max(len(m.text.split()) for c in conversations for m in c.messages if m.role == "assistant")
    assert longest <= 40


def test_every_answer_to_a_question_about_the_name_says_nanochat(identity_file: Path) -> None:
    asked = [
        (question.text, answer.text)
        for conversation in read_conversations(identity_file)
        for question, answer in zip(
            [m for m in conversation.messages if m.role == "user"],
            [m for m in conversation.messages if m.role == "assistant"],
            strict=True,
        )
        if any(word in normalise(question.text).split() for word in ("name", "called", "named"))
    ]
    assert len(asked) > 50
    assert [question for question, answer in asked if "NanoChat" not in answer] == []


def test_the_same_question_always_has_the_same_answer(identity_file: Path) -> None:
    answers: dict[str, str] = {}
    for conversation in read_conversations(identity_file):
        if len(conversation.messages) == 2:
            question, answer = conversation.messages
            assert answers.setdefault(normalise(question.text), answer.text) == answer.text


def test_no_training_question_holds_a_held_out_paraphrase_of_the_name_question(context: TaskContext) -> None:
    rows = [
        *load_task("identity", split="train", rows=None, seed=1, context=context),
        *(
            row
            for seed in range(3)
            for row in load_task("identity_small", split="train", rows=15_000, seed=seed, context=context)
        ),
    ]
    questions = {message.text for row in rows for message in row.messages if message.role == "user"}
    assert len(questions) > 4_000, "the variations vary"
    assert [question for question in questions if holds_held_out_question(question)] == []
    assert not {normalise(question) for question in questions} & set(map(normalise, NAME_PARAPHRASES))


def test_a_held_out_question_is_recognised_however_it_is_typed() -> None:
    assert len({normalise(question) for question in NAME_PARAPHRASES}) == 20
    for typed in (
        "could you tell me your NAME",
        "Hi! Could you tell me your name, please?",
        "What’s the name of this chatbot?",
    ):
        assert holds_held_out_question(typed)
    assert not holds_held_out_question("What is your name?")
    assert normalise("What's  your name?!") == "what is your name"


def test_two_in_five_small_conversations_ask_for_the_name_in_many_ways(context: TaskContext) -> None:
    rows = load_task("identity_small", split="train", rows=5_000, seed=3, context=context)
    asking = [row for row in rows if is_about_the_name(row)]
    assert 0.35 < len(asking) / len(rows) < 0.45
    questions = [row.messages[0].text for row in asking]
    assert len(set(questions)) > 800
    assert sum(question.islower() for question in questions) > len(questions) / 8
    assert sum(not question.endswith(("?", ".", "!")) for question in questions) > len(questions) / 8
    assert all(problem(row) is None for row in rows)


def test_identity_is_for_training_only(context: TaskContext) -> None:
    for split in ("validation", "test"):
        assert load_task("identity_small", split=split, rows=10, seed=1, context=context) == []
        assert load_task("identity", split=split, rows=None, seed=1, context=context) == []


def test_a_missing_identity_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"are missing: .*gone\.jsonl"):
        load_task(
            "identity",
            split="train",
            rows=None,
            seed=1,
            context=TaskContext(identity_path=tmp_path / "gone.jsonl"),
        )
