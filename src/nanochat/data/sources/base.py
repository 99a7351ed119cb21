"""What a source of text is: its shards' names, and how one revision of them is found and fetched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from nanochat.data.staging import Stop
from nanochat.store import ObjectStore


class SourceError(ValueError):
    """A source or a shard that cannot be used: which one, why, and the next step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardLocation:
    """Where a shard's bytes come from, and what they must be."""

    url: str
    size_bytes: int
    sha256: str


class PinnedSource(Protocol):
    """A source at one revision: what it says of a shard does not change any more."""

    @property
    def revision(self) -> str: ...

    def locate(self, key: str) -> ShardLocation:
        """Where the shard is and what its digest must be. Raises SourceError or HubError."""
        ...

    def fetch(self, key: str, destination: Path, stop: Stop) -> None:
        """Bring the shard to `destination`; its digest is the caller's to check.

        What a broken download left beside `destination` is continued by the next one. Raises Stopped
        where it takes long and is to stop.
        """
        ...


class Source(Protocol):
    """Named text, cut into shards. Keys are ordered; a model uses the first so many of them."""

    @property
    def name(self) -> str: ...

    @property
    def has_hub(self) -> bool:
        """Whether another machine can pull the shards from a data hub itself."""
        ...

    @property
    def has_documents(self) -> bool:
        """Whether a shard says of each text what it documents, as the offline ones do."""
        ...

    def training_shards(self) -> tuple[str, ...]: ...

    def validation_shard(self) -> str: ...

    def pin(self, store: ObjectStore, *, refresh: bool = False) -> PinnedSource:
        """The revision recorded in the store, resolved and recorded at first use.

        refresh: take the newest revision instead, and record it.
        """
        ...

    def recorded_revision(self, store: ObjectStore) -> str | None:
        """The revision that all shards a model reads must be of; None where none is recorded."""
        ...
