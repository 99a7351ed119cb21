"""GSM8K: grade-school word problems whose answers call the calculator (openai/gsm8k)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nanochat.data.conversations import Conversation, Part, exchange, problem
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.hub_rows import HubDataset
from nanochat.data.tasks.splits import Split
from nanochat.data.tasks.task import RowProblem, Task

_DATASET = HubDataset(
    task="gsm8k",
    repo="openai/gsm8k",
    config="main",
    # Only a loss is measured on the validation rows, and no choice hangs on it, so the test split
    # may lend them (as nanochat does); the dataset has no third split.
    splits={"train": "train", "validation": "test", "test": "test"},
    columns=("question", "answer"),
)
_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


def answer_parts(answer: str) -> tuple[Part, ...]:
    """An answer of the dataset, its ``<<expression=result>>`` marks turned into calculator calls.

    ``48/2 = <<48/2=24>>24 clips`` becomes the text ``48/2 = ``, the call ``48/2``, its output
    ``24`` and the text ``24 clips``. The last line, ``#### 72``, stays as it is.
    """
    parts: list[Part] = []
    end = 0
    for call in _CALL.finditer(answer):
        parts.append(Part("text", answer[end : call.start()]))
        parts.append(Part("python", call[1].strip()))
        parts.append(Part("python_output", call[2].strip()))
        end = call.end()
    parts.append(Part("text", answer[end:]))
    return tuple(part for part in parts if part.text)


def _generate(
    context: TaskContext, split: Split, rows: int | None, seed: int
) -> Iterator[Conversation | RowProblem]:
    for name, row in _DATASET.rows(context, split, rows, seed):
        conversation = exchange(row["question"], answer_parts(row["answer"]))
        wrong = problem(conversation)
        yield RowProblem(name, wrong) if wrong else conversation


GSM8K = Task(name="gsm8k", version=1, generate=_generate, inputs=_DATASET.inputs, finite=True)
