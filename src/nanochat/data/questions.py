"""Multiple-choice questions: their rows at the source, their JSONL files, and how a model is asked.

The rendering puts the letter *after* the choice with no space before it, so that the letter in the
prompt and the letter of the answer are the same token (nanochat, October 2025).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.data.conversations import Conversation, Message, exchange

_FIELDS = ("id", "question", "choices", "letters", "answer", "subject")


class QuestionError(ValueError):
    """A multiple-choice question, or a file of them, that cannot be used: which one, and why."""


@dataclass(frozen=True, slots=True)
class Question:
    """choices[i] is named by letters[i]; `answer` is one of the letters.

    Raises QuestionError for a question that has no single right letter.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    letters: tuple[str, ...]
    answer: str
    subject: str | None = None

    def __post_init__(self) -> None:
        if len(self.choices) != len(self.letters):
            raise QuestionError(
                f"question {self.id}: {len(self.choices)} choices, {len(self.letters)} letters"
            )
        if len(self.choices) < 2:
            raise QuestionError(f"question {self.id}: {len(self.choices)} choices; at least two are needed")
        if len(set(self.letters)) != len(self.letters):
            raise QuestionError(f"question {self.id}: a letter occurs twice in {list(self.letters)}")
        if self.answer not in self.letters:
            raise QuestionError(
                f"question {self.id}: the answer {self.answer!r} is none of {list(self.letters)}"
            )

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / len(self.choices)

    def to_json(self) -> dict[str, Any]:
        """The value of a JSONL line."""
        return {
            "id": self.id,
            "question": self.question,
            "choices": list(self.choices),
            "letters": list(self.letters),
            "answer": self.answer,
            "subject": self.subject,
        }

    @staticmethod
    def from_json(document: object) -> Question:
        """Raises QuestionError saying which field is wrong."""
        if not isinstance(document, dict):
            raise QuestionError(f"expected an object, got {type(document).__name__}")
        unknown = sorted(set(document) - set(_FIELDS))
        missing = [field for field in _FIELDS[:-1] if field not in document]
        if unknown or missing:
            raise QuestionError(f"unknown fields {unknown}, missing fields {missing}")
        for field in ("choices", "letters"):
            value = document[field]
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise QuestionError(f"{field}: expected an array of strings")
        for field in ("id", "question", "answer"):
            if not isinstance(document[field], str):
                raise QuestionError(f"{field}: expected a string")
        subject = document.get("subject")
        if subject is not None and not isinstance(subject, str):
            raise QuestionError("subject: expected a string or null")
        return Question(
            id=document["id"],
            question=document["question"],
            choices=tuple(document["choices"]),
            letters=tuple(document["letters"]),
            answer=document["answer"],
            subject=subject,
        )


def render(question: Question) -> str:
    """The user's turn."""
    choices = "".join(
        f"- {choice}={letter}\n" for choice, letter in zip(question.choices, question.letters, strict=True)
    )
    return (
        f"Multiple Choice question: {question.question}\n{choices}"
        "\nRespond only with the letter of the correct answer."
    )


def to_prompt(question: Question) -> Conversation:
    """The question alone, to be answered."""
    return Conversation((Message("user", render(question)),))


def to_conversation(question: Question) -> Conversation:
    """The question with the letter of its answer."""
    return exchange(render(question), question.answer)


def from_mmlu_row(row: Mapping[str, Any], id: str) -> Question:
    """A row of cais/mmlu: `question`, `subject`, `choices`, and `answer` as an index from 0.

    Raises QuestionError for an index that names no choice.
    """
    choices = tuple(row["choices"])
    letters = tuple("ABCDEFGHIJ"[: len(choices)])
    index = int(row["answer"])
    if not 0 <= index < len(choices):
        raise QuestionError(f"question {id}: the answer's index {index} is none of {len(choices)} choices")
    return Question(
        id=id,
        question=row["question"],
        choices=choices,
        letters=letters,
        answer=letters[index],
        subject=row.get("subject") or None,
    )


def from_arc_row(row: Mapping[str, Any]) -> Question:
    """A row of allenai/ai2_arc: `id`, `question`, `choices` {text, label}, `answerKey`.

    Some of its questions are labelled 1–4 instead of A–D; the labels are kept as they are.
    """
    return Question(
        id=row["id"],
        question=row["question"],
        choices=tuple(row["choices"]["text"]),
        letters=tuple(row["choices"]["label"]),
        answer=row["answerKey"],
    )


def write_questions(path: str | os.PathLike[str], questions: Iterable[Question]) -> int:
    """Write a JSONL file and return the number of lines."""
    rows = 0
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for question in questions:
            file.write(json.dumps(question.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n")
            rows += 1
    return rows


def read_questions(path: str | os.PathLike[str]) -> Iterator[Question]:
    """The questions of a JSONL file. Raises QuestionError naming file and line."""
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield Question.from_json(json.loads(raw.decode("utf-8")))
            except ValueError as error:
                raise QuestionError(f"{path}:{number}: {error}") from error
