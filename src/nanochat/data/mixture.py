"""Mixtures: the conversations of several tasks, shuffled together and written as one JSONL file.

The order depends on the mixture, the split and the seed alone. Rows are written once in the order
of the ingredients and then copied in the shuffled order, so a mixture of a million conversations
needs no more memory than one of a thousand.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.data.conversations import Conversation, dumps
from nanochat.data.tasks import (
    RowProblem,
    Split,
    TaskContext,
    find_task,
    require_questions,
    require_rows,
)
from nanochat.data.tasks.custom import PREFIX
from nanochat.recipes import Ingredient
from nanochat.store.digests import digest_json

# Validation measures a loss: a fiftieth of the training rows is enough, within these bounds.
_VALIDATION_DIVISOR, _VALIDATION_MIN, _VALIDATION_MAX, _VALIDATION_OF_ALL = 50, 20, 2_000, 500
_PROBLEMS_KEPT = 5
_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class IngredientReport:
    """What one ingredient gave. asked: rows wanted (None: all there are). rows: distinct rows
    found, each written `repeat` times. skipped: rows that could not be used; problems: the first few."""

    task: str
    asked: int | None
    rows: int
    repeat: int
    skipped: int
    problems: tuple[str, ...]
    digest: str


@dataclass(frozen=True, kw_only=True)
class MixtureReport:
    """A written mixture. rows: lines of the file. samples: its first few lines."""

    split: Split
    seed: int
    rows: int
    size_bytes: int
    sha256: str
    ingredients: tuple[IngredientReport, ...]
    samples: tuple[str, ...]


def check_mixture(
    mixture: Sequence[Ingredient], *, context: TaskContext, questions: Sequence[str] = ()
) -> None:
    """Find out what is wrong before anything is downloaded, generated or trained.

    questions: names of the tasks that the model is asked at the end. Raises ConversationError naming
    the lines of a user's file; TaskError for an unknown task, a generator without a number of rows,
    a task without questions where they are asked, or one whose material is missing.
    """
    tasks = [find_task(ingredient.task) for ingredient in mixture]
    asked = [find_task(name) for name in questions]
    for task, ingredient in zip(tasks, mixture, strict=True):
        require_rows(task, ingredient.rows)
    for task in asked:
        require_questions(task)
    for task in {task.name: task for task in (*tasks, *asked)}.values():
        task.check(context)


def ingredient_digest(ingredient: Ingredient, context: TaskContext) -> str:
    """What the rows of an ingredient are made from: the task's version and the digests of its inputs.

    Raises TaskError where an input is not there yet (no corpus, no hub). Rows and repeats are not
    part of it: the recipe holds them.
    """
    task = find_task(ingredient.task)
    inputs = task.inputs(context)
    name = PREFIX if ingredient.task.startswith(PREFIX) else task.name
    return digest_json({"task": name, "version": task.version, "inputs": inputs})


def write_mixture(
    path: str | os.PathLike[str],
    mixture: Sequence[Ingredient],
    *,
    split: Split,
    seed: int,
    context: TaskContext,
    progress: Callable[[str, int], None] | None = None,
) -> MixtureReport:
    """Write a mixture that `check_mixture` has passed as JSONL; the file appears under its name when
    it is whole.

    For the split ``validation`` an ingredient gives a fiftieth of its rows, from 20 to 2,000; the
    identity conversations and a user's own file give none, since all of theirs are for training.
    progress: called with task and rows after each ingredient. Raises TaskError for missing material.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        spool, target = Path(folder, "rows"), Path(folder, "shuffled")
        bounds = [0]
        spans, reports = [], []
        with spool.open("wb") as file:
            for ingredient in mixture:
                start = len(bounds) - 1
                skipped = 0
                problems: list[str] = []
                for row in _rows(ingredient, split=split, seed=seed, context=context):
                    if isinstance(row, RowProblem):
                        skipped += 1
                        if len(problems) < _PROBLEMS_KEPT:
                            problems.append(f"{row.row}: {row.reason}")
                        continue
                    bounds.append(bounds[-1] + file.write(dumps(row).encode() + b"\n"))
                rows = len(bounds) - 1 - start
                spans.append((start, start + rows, ingredient.repeat))
                reports.append(
                    IngredientReport(
                        task=ingredient.task,
                        asked=_asked(ingredient, split),
                        rows=rows,
                        repeat=ingredient.repeat,
                        skipped=skipped,
                        problems=tuple(problems),
                        digest=ingredient_digest(ingredient, context),
                    )
                )
                if progress:
                    progress(ingredient.task, rows)
        order = _order(spans, split, seed)
        sha256, size_bytes, samples = _copy(spool, target, bounds, order)
        os.replace(target, path)
    return MixtureReport(
        split=split,
        seed=seed,
        rows=len(order),
        size_bytes=size_bytes,
        sha256=sha256,
        ingredients=tuple(reports),
        samples=samples,
    )


def _rows(
    ingredient: Ingredient, *, split: Split, seed: int, context: TaskContext
) -> Iterator[Conversation | RowProblem]:
    return find_task(ingredient.task).generate(context, split, _asked(ingredient, split), seed)


def _asked(ingredient: Ingredient, split: Split) -> int | None:
    if split == "train":
        return ingredient.rows
    if ingredient.rows is None:
        return _VALIDATION_OF_ALL
    return min(max(ingredient.rows // _VALIDATION_DIVISOR, _VALIDATION_MIN), _VALIDATION_MAX)


def _order(spans: Sequence[tuple[int, int, int]], split: Split, seed: int) -> list[int]:
    """Row numbers in the order of the file; spans are (first row, end, repeat) by ingredient."""
    order = [row for start, end, repeat in spans for _ in range(repeat) for row in range(start, end)]
    random.Random(f"mixture/{split}/{seed}").shuffle(order)
    return order


def _copy(
    spool: Path, target: Path, bounds: Sequence[int], order: Sequence[int]
) -> tuple[str, int, tuple[str, ...]]:
    """Copy rows in `order`; returns SHA-256, bytes and the first rows."""
    digest = hashlib.sha256()
    size = 0
    samples: list[str] = []
    with spool.open("rb") as source, target.open("wb") as file:
        for row in order:
            source.seek(bounds[row])
            line = source.read(bounds[row + 1] - bounds[row])
            digest.update(line)
            size += file.write(line)
            if len(samples) < _SAMPLES:
                samples.append(line.decode().rstrip("\n"))
    return digest.hexdigest(), size, tuple(samples)
