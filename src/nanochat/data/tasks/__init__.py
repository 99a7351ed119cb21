"""Tasks: where conversations and multiple-choice questions come from, by name.

A task gives the same rows for the same (split, rows, seed) and the same inputs, and its splits
share no row: the hub's tasks use their published splits, the generators hold out words, sums and
modules by hash. ``jsonl:<path>`` names a file of the user's.
"""

from __future__ import annotations

from collections.abc import Callable

from nanochat.data.questions import Question
from nanochat.data.tasks.arithmetic import ARITHMETIC, DIRECT_SUMS, WORD_PROBLEMS
from nanochat.data.tasks.context import TaskContext, TaskError
from nanochat.data.tasks.custom import PREFIX, custom_task
from nanochat.data.tasks.docstring_chat import DOCSTRING_CHAT
from nanochat.data.tasks.gsm8k import GSM8K
from nanochat.data.tasks.identity import IDENTITY, IDENTITY_SMALL
from nanochat.data.tasks.letter_counts import LETTER_COUNT_BY_HAND, LETTER_COUNT_TOOL, SPELLING_BEE
from nanochat.data.tasks.multiple_choice import ARC_CHALLENGE, ARC_EASY, MMLU, MMLU_AUXILIARY_TRAIN
from nanochat.data.tasks.offline_questions import OFFLINE_ARC_EASY, OFFLINE_MMLU
from nanochat.data.tasks.smoltalk import SMOLTALK
from nanochat.data.tasks.spelling import SIMPLE_SPELLING, SIMPLE_SPELLING_SMALL
from nanochat.data.tasks.splits import SPLITS, Split
from nanochat.data.tasks.task import RowProblem, Task, generator_of

__all__ = [
    "SPLITS",
    "TASKS",
    "RowProblem",
    "Split",
    "Task",
    "TaskContext",
    "TaskError",
    "find_task",
    "load_questions",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SMOLTALK,
        MMLU_AUXILIARY_TRAIN,
        MMLU,
        GSM8K,
        ARC_EASY,
        ARC_CHALLENGE,
        IDENTITY,
        SIMPLE_SPELLING,
        SPELLING_BEE,
        IDENTITY_SMALL,
        SIMPLE_SPELLING_SMALL,
        LETTER_COUNT_TOOL,
        LETTER_COUNT_BY_HAND,
        DOCSTRING_CHAT,
        ARITHMETIC,
        DIRECT_SUMS,
        WORD_PROBLEMS,
        OFFLINE_MMLU,
        OFFLINE_ARC_EASY,
    )
}


def find_task(name: str) -> Task:
    """Raises TaskError naming the tasks there are."""
    if name.startswith(PREFIX):
        return custom_task(name)
    if name not in TASKS:
        raise TaskError(
            f"unknown task {name!r}. Known tasks: {', '.join(TASKS)}; a file of your own is '{PREFIX}<path>'"
        )
    return TASKS[name]


def require_rows(task: Task, rows: int | None) -> None:
    """Raises TaskError where a task without an end is asked for all its rows."""
    if rows is None and not task.finite:
        raise TaskError(
            f"task {task.name!r} makes as many rows as it is asked for: give its ingredient rows=…"
        )


def require_questions(task: Task) -> Callable[[TaskContext, Split], list[Question]]:
    """What makes the task's multiple-choice questions. Raises TaskError for a task that has none."""
    if task.questions is None:
        having = ", ".join(other.name for other in TASKS.values() if other.questions)
        raise TaskError(f"task {task.name!r} has no multiple-choice questions; these have: {having}")
    return task.questions


def load_questions(
    name: str, *, split: Split, context: TaskContext, limit: int | None = None
) -> list[Question]:
    """The multiple-choice questions of a task's split, in order; a fixed sample of `limit` of them.

    Raises TaskError for a task that has none.
    """
    questions = require_questions(find_task(name))(context, split)
    if limit is None or limit >= len(questions):
        return questions
    chosen = sorted(generator_of(f"{name}/limit", split, 0).sample(range(len(questions)), limit))
    return [questions[index] for index in chosen]
