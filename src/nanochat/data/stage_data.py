"""The conversations and questions that midtraining and fine-tuning read, as files.

`train.jsonl` is the shuffled mixture, `validation.jsonl` its held-out part; fine-tuning adds
`mmlu.jsonl` and `arc_easy.jsonl` (questions that no training row repeats) and, where the recipe
asks for it, `skills.jsonl`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat.data.conversations import read_conversations
from nanochat.data.heldout import held_out_questions, write_held_out
from nanochat.data.hub_datasets import HubDatasets
from nanochat.data.mixture import MixtureReport, check_mixture, write_mixture
from nanochat.data.parquet import iter_documents
from nanochat.data.questions import write_questions
from nanochat.data.shards import verified_shard_path
from nanochat.data.sources import get_source
from nanochat.data.sources.offline import read_offline_documents
from nanochat.data.tasks import TaskContext, TaskError, load_questions
from nanochat.recipes import Midtrain, Recipe, Sft
from nanochat.store import ObjectStore, project_root
from nanochat.store.digests import digest_json
from nanochat.store.local import local_copy
from nanochat.store.receipts import FileRef

TRAIN, VALIDATION, MMLU, ARC_EASY, SKILLS = (
    "train.jsonl",
    "validation.jsonl",
    "mmlu.jsonl",
    "arc_easy.jsonl",
    "skills.jsonl",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageData:
    """Files written, and what each ingredient of the two mixtures gave."""

    files: tuple[Path, ...]
    train: MixtureReport
    validation: MixtureReport
    questions: dict[str, int]


class StoredHub:
    """The hub's datasets as tasks see them: files that the store holds.

    fetch: bring what is missing. Otherwise a dataset that is not here raises TaskError, so that
    looking at a plan never reaches for the network.
    """

    def __init__(self, store: ObjectStore, *, fetch: bool) -> None:
        self._store = store
        self._datasets = HubDatasets(store)
        self._fetch = fetch

    def files(self, repo: str, config: str, split: str) -> list[Path]:
        """Local paths of one split's parquet files. Raises TaskError, HubError."""
        return [local_copy(self._store, file) for file in self._references(repo, config, split)]

    def digest(self, repo: str, config: str, split: str) -> str:
        """Of the files' content."""
        files = self._references(repo, config, split)
        return digest_json(
            {"repo": repo, "config": config, "split": split, "files": [f.sha256 for f in files]}
        )

    def _references(self, repo: str, config: str, split: str) -> tuple[FileRef, ...]:
        if not self._fetch and not self._datasets.has(repo, config, split):
            raise TaskError(
                f"dataset {repo} ({config}/{split}) is not in the store; materializing "
                "midtraining_datasets or sft_datasets fetches it"
            )
        return self._datasets.files(repo, config, split)


def task_context(
    store: ObjectStore, recipe: Recipe, *, corpus_digest: str | None, fetch: bool = False
) -> TaskContext:
    """What the recipe's tasks may read: its own training shards, the hub, the identity file.

    fetch: datasets of the hub that are not in the store yet are brought there when a task asks. A
    shard is verified before it is read, so reading raises ShardError where it is damaged or gone.
    """
    source = get_source(recipe.data.source)
    path = functools.cache(functools.partial(verified_shard_path, store, source.name))

    def paths() -> Iterator[Path]:
        return (path(shard) for shard in source.training_shards()[: recipe.data.shards])

    return TaskContext(
        hub=StoredHub(store, fetch=fetch),
        source=source.name,
        offline_documents=(lambda: read_offline_documents(paths())) if source.has_documents else None,
        texts=lambda: iter_documents(paths()),
        corpus_digest=corpus_digest,
        identity_path=identity_path(),
    )


def identity_path() -> Path:
    """The identity conversations that the project ships."""
    return project_root() / "data" / "identity_conversations.jsonl"


def corpus_digest(shard_digests: dict[str, str]) -> str:
    """One digest for the training text, from the digests of its shards."""
    return digest_json(shard_digests)


def write_stage_data(
    recipe: Recipe,
    section: Midtrain | Sft,
    context: TaskContext,
    folder: Path,
    progress: Callable[[str], None],
) -> StageData:
    """Write the stage's files into `folder`.

    Raises TaskError, ConversationError, ShardError and SourceError before training.
    """
    asked = {MMLU: section.mmlu_task, ARC_EASY: section.arc_easy_task} if isinstance(section, Sft) else {}
    tests = {name: task for name, task in asked.items() if task is not None}
    check_mixture(section.mixture, context=context, questions=tuple(tests.values()))
    reports = {}
    for name, split in ((TRAIN, "train"), (VALIDATION, "validation")):
        reports[split] = write_mixture(
            folder / name,
            section.mixture,
            split=split,  # type: ignore[arg-type]
            seed=section.seed,
            context=context,
            progress=functools.partial(_say, progress, split),
        )
    files = [folder / TRAIN]
    if reports["validation"].rows:  # the user's own conversations and the identity ones are all for training
        files.append(folder / VALIDATION)
    questions: dict[str, int] = {}
    if isinstance(section, Sft):
        for name, task in tests.items():
            chosen = load_questions(task, split="test", context=context, limit=section.eval_questions)
            questions[name.removesuffix(".jsonl")] = write_questions(folder / name, chosen)
            files.append(folder / name)
        if section.skills:
            questions["skills"] = write_held_out(folder / SKILLS, held_out_questions(context))
            files.append(folder / SKILLS)
    return StageData(
        files=tuple(files),
        train=reports["train"],
        validation=reports["validation"],
        questions=questions,
    )


def _say(progress: Callable[[str], None], split: str, task: str, rows: int) -> None:
    if split == "train":
        progress(f"{task}: {rows:,} conversations")


def count_characters(path: Path) -> int:
    """Characters of everything said in a file of conversations."""
    return sum(
        len(message.text) for conversation in read_conversations(path) for message in conversation.messages
    )
