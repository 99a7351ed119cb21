"""A user's own text: a folder of parquet files with a ``text`` column."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

from nanochat.data.sources.base import ShardLocation, SourceError
from nanochat.data.sources.offline import holds_documents
from nanochat.data.staging import Stop
from nanochat.store import ObjectStore
from nanochat.store.digests import digest_file, digest_json

# What Dagster accepts in a partition key, and what is also a file name everywhere.
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Shards are the files of `folder` in the order of their names; the last one is for validation.

    The folder is the user's: it is looked at whenever it is asked about, and nothing is written
    there. Raises SourceError where the folder is no usable source.
    """

    name: str
    folder: Path
    has_hub: bool = False

    def training_shards(self) -> tuple[str, ...]:
        return tuple(self._files())[:-1]

    def validation_shard(self) -> str:
        return tuple(self._files())[-1]

    @property
    def has_documents(self) -> bool:
        return holds_documents(next(iter(self._files().values())))

    def pin(self, store: ObjectStore, *, refresh: bool = False) -> PinnedFolder:
        """The folder as it is now: there is nothing that could be pinned.

        Its revision is a digest of the files' names, sizes and times of change: what can be told
        without reading them all. Ingestion reads whatever changed.
        """
        files = self._files()
        listing = {}
        for key, path in files.items():
            status = path.stat()
            listing[key] = [status.st_size, status.st_mtime_ns]
        return PinnedFolder(self.name, digest_json(listing), files)

    def recorded_revision(self, store: ObjectStore) -> None:
        return None

    def _files(self) -> dict[str, Path]:
        if not self.folder.is_dir():
            raise SourceError(f"source {self.name}: {self.folder} is not a folder; correct NANOCHAT_SOURCES")
        paths = sorted(self.folder.glob("*.parquet"))
        if len(paths) < 2:
            raise SourceError(
                f"source {self.name}: {self.folder} has {len(paths)} parquet files; at least two are needed "
                "(the last one, in the order of names, is kept for validation)"
            )
        for path in paths:
            if not _STEM.fullmatch(path.stem):
                raise SourceError(
                    f"source {self.name}: {path.name!r} cannot name a shard; rename it to letters, digits, "
                    "'_', '-' and single dots"
                )
        return {f"{self.name}_{path.stem}": path for path in paths}


@dataclasses.dataclass(frozen=True)
class PinnedFolder:
    """A folder as it was when it was looked at."""

    name: str
    revision: str
    files: dict[str, Path]

    def locate(self, key: str) -> ShardLocation:
        path = self.files[key]
        return ShardLocation(
            url=path.resolve().as_uri(), size_bytes=path.stat().st_size, sha256=digest_file(path)
        )

    def fetch(self, key: str, destination: Path, stop: Stop) -> None:
        shutil.copyfile(self.files[key], destination)
