"""Sources whose shards are parquet files of a dataset repository on a data hub."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar

from nanochat.data.hub import HubError, HubRepo
from nanochat.data.sources.base import ShardLocation
from nanochat.data.staging import Stop
from nanochat.store import ObjectNotFound, ObjectStore, PreconditionFailed
from nanochat.store.documents import Document


class SourceRevision(Document):
    """The revision of a source that this store uses, until somebody asks for a newer one."""

    schema_name: ClassVar[str] = "nanochat.source_revision"
    source: str
    repo: str
    revision: str


@dataclasses.dataclass(frozen=True)
class HubSource:
    """Shards ``<prefix>_00000`` … are the files ``shard_00000.parquet`` … of `repo`.

    shards: how many files there are; the last one is the validation shard.
    """

    name: str
    repo: str
    prefix: str
    shards: int
    has_hub: bool = True
    has_documents: bool = False

    @functools.cache  # noqa: B019  (sources are few, and live as long as the process)
    def training_shards(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}_{index:05d}" for index in range(self.shards - 1))

    def validation_shard(self) -> str:
        return f"{self.prefix}_{self.shards - 1:05d}"

    def at(self, revision: str) -> PinnedHub:
        """The source at a revision that is known already (a machine without the store's records)."""
        return PinnedHub(self, revision, HubRepo(self.repo))

    def pin(self, store: ObjectStore, *, refresh: bool = False) -> PinnedHub:
        """Raises HubError where the revision has to be asked for and the hub does not give it."""
        recorded = self.recorded_revision(store)
        if recorded and not refresh:
            return self.at(recorded)
        hub = HubRepo(self.repo)
        newest = SourceRevision(source=self.name, repo=self.repo, revision=hub.newest_revision())
        try:
            store.put(self._revision_key, newest.to_bytes(), if_absent=not refresh)
        except PreconditionFailed:  # another process asked first: its answer is the recorded one
            return self.pin(store)
        return PinnedHub(self, newest.revision, hub)

    def recorded_revision(self, store: ObjectStore) -> str | None:
        try:
            return SourceRevision.read(store, self._revision_key).revision
        except ObjectNotFound:
            return None

    @property
    def _revision_key(self) -> str:
        return f"shards/{self.name}/revision.json"

    def path(self, key: str) -> str:
        """The file of a shard in the repository."""
        return f"shard{key.removeprefix(self.prefix)}.parquet"


@dataclasses.dataclass(frozen=True)
class PinnedHub:
    """A hub source at one commit."""

    source: HubSource
    revision: str
    hub: HubRepo

    def locate(self, key: str) -> ShardLocation:
        path = self.source.path(key)
        file = self.hub.file(path, self.revision)
        if file.sha256 is None:
            raise HubError(
                f"dataset {self.source.repo}: {path} at revision {self.revision} has no sha256 in the hub's "
                "metadata (it is not stored as a large file), so it cannot be verified"
            )
        return ShardLocation(
            url=self.hub.url(path, self.revision), size_bytes=file.size_bytes, sha256=file.sha256
        )

    def fetch(self, key: str, destination: Path, stop: Stop) -> None:
        self.hub.download(self.source.path(key), self.revision, destination, stop)


# karpathy/fineweb-edu-100b-shuffle: 1,822 training shards and shard_01822 for validation.
FINEWEB_EDU = HubSource(
    name="fineweb-edu", repo="karpathy/fineweb-edu-100b-shuffle", prefix="shard", shards=1823
)
# karpathy/climbmix-400b-shuffle: 6,543 shards, the last for validation.
CLIMBMIX = HubSource(name="climbmix", repo="karpathy/climbmix-400b-shuffle", prefix="climbmix", shards=6543)
