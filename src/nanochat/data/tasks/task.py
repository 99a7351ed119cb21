"""What a task is: named rows of conversations, and for some a set of questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nanochat.data.conversations import Conversation
from nanochat.data.questions import Question
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.splits import Split


class RowProblem(NamedTuple):
    """A row of someone else's data that cannot be used: it is left out and reported."""

    row: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source of conversations, deterministic in (split, rows, seed) and its inputs.

    generate(context, split, rows, seed) yields conversations; rows None means all there are, which
    only a `finite` task has, and one that has fewer yields fewer. inputs(context) identifies by
    digests what it reads. check(context) says what is wrong with it before anything is made (raises
    TaskError or ConversationError). version: raised by hand when the same inputs give other rows.
    """

    name: str
    version: int
    generate: Callable[[TaskContext, Split, int | None, int], Iterator[Conversation | RowProblem]]
    inputs: Callable[[TaskContext], dict[str, str]]
    questions: Callable[[TaskContext, Split], list[Question]] | None = None
    check: Callable[[TaskContext], None] = lambda context: None
    finite: bool = False


def generated(
    *,
    name: str,
    version: int,
    make: Callable[[TaskContext, Split, int, random.Random], Iterator[Conversation]],
    inputs: Callable[[TaskContext], dict[str, str]],
    questions: Callable[[TaskContext, Split], list[Question]] | None = None,
    check: Callable[[TaskContext], None] = lambda context: None,
) -> Task:
    """A task without an end: make(context, split, rows, random numbers) yields as many as asked for."""

    def generate(context: TaskContext, split: Split, rows: int | None, seed: int) -> Iterator[Conversation]:
        assert rows is not None, "a task without an end is asked for a number of rows"
        return make(context, split, rows, generator_of(name, split, seed))

    return Task(
        name=name, version=version, generate=generate, inputs=inputs, questions=questions, check=check
    )


def no_inputs(context: TaskContext) -> dict[str, str]:
    """Of a task that is made from nothing but its own code."""
    return {}


def generator_of(task: str, split: Split, seed: int) -> random.Random:
    """The random numbers of one task: independent of the tasks beside it. A string seed goes through
    SHA-512, so it is the same on every machine and in every process."""
    return random.Random(f"{task}/{split}/{seed}")


def choose_rows(task: str, split: Split, seed: int, total: int, rows: int | None) -> list[int]:
    """Which rows of a source of `total` rows are taken, in ascending order: all, or a fixed sample."""
    if rows is None or rows >= total:
        return list(range(total))
    return sorted(generator_of(task, split, seed).sample(range(total), rows))
