"""What tasks may read: the hub's datasets, the offline documents, the identity file, and words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

# A word stands for itself: not a part of an identifier, a path or a number.
_WORD = re.compile(r"(?<![A-Za-z0-9_.'/\\-])[a-z]{3,15}(?![A-Za-z0-9_'/\\])")

IDENTITY_FILE = "identity_conversations.jsonl"


class TaskError(ValueError):
    """A task that cannot give its rows: which, and what it needs."""


class TextNeeded(TaskError):
    """A task is made from the model's training text, and that is not ingested yet."""


class Document(Protocol):
    """A row of an offline shard, as `nanochat.data.sources.offline` writes and reads it.

    name: what the text documents inside `module`, "" for the module itself. kind: ``docstring``,
    ``topic`` or ``readme``. part: 0, or which further piece of a long text.
    """

    @property
    def text(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def part(self) -> int: ...


class HubFiles(Protocol):
    """Datasets of the hub, each at the revision that the store has pinned."""

    def files(self, repo: str, config: str, split: str) -> Sequence[Path]:
        """Local, verified parquet files of one split, in the dataset's order."""
        ...

    def digest(self, repo: str, config: str, split: str) -> str:
        """Digest of the content of those files."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Where tasks find their material. Only what a mixture needs has to be given.

    source: the source of the model's training text. offline_documents: a fresh iterable of the
    training shards' documents at each call; None where the source has texts alone. texts: what
    words are taken from, the model's own training text; the offline documents where it is None.
    corpus_digest: identifies both, and enters the digest of every task that reads them. Documents
    and words are read once and kept.
    """

    hub: HubFiles | None = None
    source: str | None = None
    offline_documents: Callable[[], Iterable[Document]] | None = None
    texts: Callable[[], Iterable[str]] | None = None
    corpus_digest: str | None = None
    identity_path: Path | None = None
    min_word_count: int = 3
    max_word_chars: int = 100_000_000
    _kept: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def keep(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made once for this context: several tasks derive the same from its text."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept

    def documents(self) -> tuple[Document, ...]:
        """The offline documents. Raises TaskError where the context has none."""
        return self._documents

    def require_documents(self, task: str) -> None:
        """Raises TaskError where the model's source does not say what its texts document."""
        if self.offline_documents is None:
            raise TaskError(
                f"task {task!r} is made from documentation, and source {self.source!r} of this model has no "
                "offline documents, only texts. Take source 'offline' in the recipe's data section, or "
                "another task (the hub has mmlu and arc_easy)"
            )

    def words(self) -> tuple[str, ...]:
        """Lower-case words of 3–15 letters in the model's own training text, the commonest first.

        A word counts where it occurs `min_word_count` times in the first `max_word_chars`
        characters. nanochat downloads a list of 370,000 words instead; the training text needs no
        download and holds no word that the tokenizer has never seen.
        """
        return self._words

    def require_hub(self, task: str) -> HubFiles:
        """Raises TaskError where the context has no hub."""
        if self.hub is None:
            raise TaskError(f"task {task!r} reads a dataset of the hub, and no hub is configured here")
        return self.hub

    def require_corpus_digest(self, task: str) -> str:
        """Raises TaskError where the caller did not say which text this is."""
        if self.corpus_digest is None:
            raise TextNeeded(f"task {task!r} is made from training text, which is not ingested yet")
        return self.corpus_digest

    def require_identity(self) -> Path:
        """The file of identity conversations. Raises TaskError where it is missing."""
        if self.identity_path is None or not self.identity_path.is_file():
            raise TaskError(
                f"the identity conversations are missing: {self.identity_path or 'no path given'}. "
                f"The project ships them as data/{IDENTITY_FILE}"
            )
        return self.identity_path

    @cached_property
    def _documents(self) -> tuple[Document, ...]:
        if self.offline_documents is None:
            raise TaskError("no offline documents here: source 'offline' has them")
        return tuple(self.offline_documents())

    @cached_property
    def _words(self) -> tuple[str, ...]:
        counts: Counter[str] = Counter()
        left = self.max_word_chars
        for text in self._texts():
            counts.update(_WORD.findall(text[:left]))
            left -= len(text)
            if left <= 0:
                break
        common = [word for word, count in counts.items() if count >= self.min_word_count]
        if not common:
            raise TaskError("the training text holds no words to spell or to count letters in")
        return tuple(sorted(common, key=lambda word: (-counts[word], word)))

    def _texts(self) -> Iterable[str]:
        if self.texts is not None:
            return self.texts()
        return (document.text for document in self.documents())
