"""The rows of a task as tests want them: in a list, those that cannot be used left out."""

from __future__ import annotations

from nanochat.data.conversations import Conversation
from nanochat.data.tasks import TaskContext, find_task
from nanochat.data.tasks.splits import Split


def load_task(
    name: str, *, split: Split, rows: int | None, seed: int, context: TaskContext
) -> list[Conversation]:
    found = find_task(name).generate(context, split, rows, seed)
    return [row for row in found if isinstance(row, Conversation)]
