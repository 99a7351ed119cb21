"""SmolTalk: general chat (HuggingFaceTB/smol-smoltalk, 460K conversations)."""

from __future__ import annotations

from collections.abc import Iterator

from nanochat.data.conversations import Conversation, Message, problem
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.hub_rows import HubDataset
from nanochat.data.tasks.splits import Split
from nanochat.data.tasks.task import RowProblem, Task

_DATASET = HubDataset(
    task="smoltalk",
    repo="HuggingFaceTB/smol-smoltalk",
    config="default",
    # There is no validation split; the test split is in no benchmark, so it serves as both.
    splits={"train": "train", "validation": "test", "test": "test"},
    columns=("messages",),
)


def _generate(
    context: TaskContext, split: Split, rows: int | None, seed: int
) -> Iterator[Conversation | RowProblem]:
    for name, row in _DATASET.rows(context, split, rows, seed):
        conversation = Conversation(
            tuple(Message(message["role"], message["content"] or "") for message in row["messages"] or ())
        )
        wrong = problem(conversation)
        yield RowProblem(name, wrong) if wrong else conversation


SMOLTALK = Task(name="smoltalk", version=1, generate=_generate, inputs=_DATASET.inputs, finite=True)
