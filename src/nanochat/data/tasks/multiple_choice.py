"""MMLU and ARC: multiple-choice questions of the hub (cais/mmlu, allenai/ai2_arc)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from nanochat.data.conversations import Conversation
from nanochat.data.questions import Question, QuestionError, from_arc_row, from_mmlu_row, to_conversation
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.hub_rows import HubDataset
from nanochat.data.tasks.splits import Split
from nanochat.data.tasks.task import RowProblem, Task


def _mmlu_question(name: str, row: dict[str, Any]) -> Question:
    return from_mmlu_row(row, id=name)


def _arc_question(name: str, row: dict[str, Any]) -> Question:
    return from_arc_row(row)


def _task(dataset: HubDataset, to_question: Callable[[str, dict[str, Any]], Question]) -> Task:
    def read(
        context: TaskContext, split: Split, rows: int | None, seed: int
    ) -> Iterator[Question | RowProblem]:
        for name, row in dataset.rows(context, split, rows, seed):
            try:
                yield to_question(name, row)
            except QuestionError as error:
                yield RowProblem(name, str(error))

    def generate(
        context: TaskContext, split: Split, rows: int | None, seed: int
    ) -> Iterator[Conversation | RowProblem]:
        for item in read(context, split, rows, seed):
            yield item if isinstance(item, RowProblem) else to_conversation(item)

    def questions(context: TaskContext, split: Split) -> list[Question]:
        return [item for item in read(context, split, None, 0) if isinstance(item, Question)]

    return Task(
        name=dataset.task,
        version=1,
        generate=generate,
        inputs=dataset.inputs,
        questions=questions,
        finite=True,
    )


def _mmlu(task: str, train: str) -> Task:
    return _task(
        HubDataset(
            task=task,
            repo="cais/mmlu",
            config="all",
            splits={"train": train, "validation": "validation", "test": "test"},
            columns=("question", "subject", "choices", "answer"),
        ),
        _mmlu_question,
    )


def _arc(task: str, config: str) -> Task:
    return _task(
        HubDataset(
            task=task,
            repo="allenai/ai2_arc",
            config=config,
            splits={"train": "train", "validation": "validation", "test": "test"},
            columns=("id", "question", "choices", "answerKey"),
        ),
        _arc_question,
    )


MMLU = _mmlu("mmlu", "dev")
# Drawn from other exams (ARC, RACE, OBQA, MC_TEST), so MMLU's own validation split can watch it.
MMLU_AUXILIARY_TRAIN = _mmlu("mmlu_auxiliary_train", "auxiliary_train")
ARC_EASY = _arc("arc_easy", "ARC-Easy")
ARC_CHALLENGE = _arc("arc_challenge", "ARC-Challenge")
