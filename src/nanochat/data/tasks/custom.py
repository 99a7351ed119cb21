"""The user's own conversations: ``jsonl:<path>`` in a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nanochat.data.conversations import Conversation, read_conversations, require_valid
from nanochat.data.tasks.context import TaskContext, TaskError
from nanochat.data.tasks.splits import Split
from nanochat.data.tasks.task import Task, choose_rows
from nanochat.store.digests import digest_file

PREFIX = "jsonl:"


def custom_path(name: str) -> Path:
    """The file that ``jsonl:<path>`` names; a relative path is relative to the working directory."""
    return Path(name.removeprefix(PREFIX)).expanduser()


def custom_task(name: str) -> Task:
    """The task for one file. All its conversations are for training; it has no other split."""
    path = custom_path(name)
    return Task(
        name=name,
        version=2,
        generate=partial(_generate, path),
        inputs=partial(_inputs, name, path),
        check=lambda context: require_valid(path),
        finite=True,
    )


def _generate(
    path: Path, context: TaskContext, split: Split, rows: int | None, seed: int
) -> Iterator[Conversation]:
    if split != "train":
        return
    conversations = list(read_conversations(path))
    # Not the path: the same file elsewhere is the same task.
    for index in choose_rows(PREFIX, split, seed, len(conversations), rows):
        yield conversations[index]


def _inputs(name: str, path: Path, context: TaskContext) -> dict[str, str]:
    """Of any file, right or wrong: its lines are looked at once, by `check`, and not for every plan."""
    if not path.is_file():
        raise TaskError(
            f"task {name!r}: {path.absolute()} is no file. Correct the path in the recipe's mixture"
        )
    return {"file": digest_file(path)}
