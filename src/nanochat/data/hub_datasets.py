"""Task data: the parquet files of dataset repositories, at a pinned revision, kept in the store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from nanochat.data.hub import HubError, HubRepo, RemoteFile
from nanochat.data.staging import alone, staging_folder
from nanochat.store import ObjectNotFound, ObjectStore
from nanochat.store.digests import digest_file
from nanochat.store.documents import Document
from nanochat.store.receipts import FileRef

if TYPE_CHECKING:
    import pyarrow as pa


class DatasetRecord(Document):
    """Which revision of a dataset this store uses, and the files it has of it, by path."""

    schema_name: ClassVar[str] = "nanochat.dataset"
    repo: str
    revision: str
    files: dict[str, FileRef] = Field(default_factory=dict)


class HubDatasets:
    """Datasets of a hub as tables. A revision is resolved at first use, recorded, and kept until
    `refresh`; files are downloaded once, verified and recorded.

    endpoint: None means ``HF_ENDPOINT``, else the public hub.
    """

    def __init__(self, store: ObjectStore, *, endpoint: str | None = None) -> None:
        self._store = store
        self._endpoint = endpoint
        self._hubs: dict[str, HubRepo] = {}

    def rows(self, repo: str, config: str, split: str) -> pa.Table:
        """All rows of one split, e.g. ``rows("openai/gsm8k", "main", "train")``.

        Raises HubError where the hub or the dataset does not have it.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for file in self.files(repo, config, split):
            path = self._store.local_path(file.key)
            source = path if path is not None else pa.BufferReader(self._store.get(file.key))
            tables.append(pq.read_table(source))
        return pa.concat_tables(tables, promote_options="permissive")

    def files(self, repo: str, config: str, split: str) -> tuple[FileRef, ...]:
        """The split's files, in the store, in the dataset's order. Raises HubError."""
        record = self._record(repo)
        known = _split_paths(record.files, config, split)
        whole = [record.files[path] for path in known if self._is_there(record.files[path])]
        if known and len(whole) == len(known) == _announced(known):
            return tuple(whole)
        hub = self._hub(repo)
        listing = hub.files(record.revision)
        paths = _split_paths(listing, config, split)
        if not paths:
            raise HubError(
                f"dataset {repo} has no parquet files of split {split!r} of {config!r} at revision "
                f"{record.revision}. It has: {_describe(listing)}."
            )
        return tuple(self._ingest(hub, record.revision, listing[path]) for path in paths)

    def has(self, repo: str, config: str, split: str) -> bool:
        """Whether the store holds the whole split already: answered without the network."""
        recorded = self._read(repo)
        known = _split_paths(recorded.files, config, split) if recorded else []
        return bool(
            recorded
            and known
            and len(known) == _announced(known)
            and all(self._is_there(recorded.files[path]) for path in known)
        )

    def revision(self, repo: str, *, refresh: bool = False) -> str:
        """The revision this store uses of a dataset; refresh: take the newest one from now on."""
        return self._record(repo, refresh=refresh).revision

    def _record(self, repo: str, *, refresh: bool = False) -> DatasetRecord:
        with alone(staging_folder(self._store, _folder(repo)) / "record.lock"):
            recorded = self._read(repo)
            if recorded and not refresh:
                return recorded
            newest = self._hub(repo).newest_revision()
            if recorded and recorded.revision == newest:
                return recorded
            record = DatasetRecord(repo=repo, revision=newest)
            self._store.put(_record_key(repo), record.to_bytes())
            return record

    def _read(self, repo: str) -> DatasetRecord | None:
        try:
            return DatasetRecord.read(self._store, _record_key(repo))
        except ObjectNotFound:
            return None

    def _ingest(self, hub: HubRepo, revision: str, remote: RemoteFile) -> FileRef:
        folder = staging_folder(self._store, _folder(hub.repo))
        with alone(folder / "record.lock"):
            record = self._read(hub.repo)
            if record is None or record.revision != revision:
                raise HubError(f"dataset {hub.repo} was moved to another revision meanwhile; run it again")
            present = record.files.get(remote.path)
            if present and self._is_there(present):
                return present
            file = self._fetch(hub, revision, remote, folder)
            record = record.model_copy(update={"files": {**record.files, remote.path: file}})
            self._store.put(_record_key(hub.repo), record.to_bytes())
            return file

    def _fetch(self, hub: HubRepo, revision: str, remote: RemoteFile, folder: Path) -> FileRef:
        """Download one file, once more where it arrives damaged, and put it into the store."""
        staged = folder / remote.path.replace("/", "__")
        for attempt in (1, 2):
            hub.download(remote.path, revision, staged)
            size, found = staged.stat().st_size, digest_file(staged)
            # Of a file kept in git itself the hub tells no sha256: then only its size is compared.
            if size == remote.size_bytes and remote.sha256 in (found, None):
                break
            staged.unlink()
            if attempt == 2:
                raise HubError(
                    f"dataset {hub.repo}: {remote.path} arrived damaged twice: expected sha256 "
                    f"{remote.sha256} ({remote.size_bytes} bytes), got {found} ({size} bytes). "
                    "Check the mirror (HF_ENDPOINT) or proxy in between, then run it again."
                )
        key = f"{_folder(hub.repo)}/{revision[:12]}/{remote.path}"
        self._store.put_file(key, staged, move=True)
        return FileRef(key=key, size_bytes=size, sha256=found)

    def _is_there(self, file: FileRef) -> bool:
        info = self._store.head(file.key)
        return info is not None and info.size == file.size_bytes

    def _hub(self, repo: str) -> HubRepo:
        if repo not in self._hubs:
            self._hubs[repo] = HubRepo(repo, endpoint=self._endpoint)
        return self._hubs[repo]


# How the hub's datasets lay out a split: `<config>/<split>-00000-of-00002.parquet`; the config
# "default" lies in `data/`. A dataset converted by the hub itself has `<config>/<split>/0000.parquet`.
_FILE = re.compile(
    r"(?P<config>[^/]+)/(?P<split>[A-Za-z0-9_.]+?)(?:-(?P<index>\d+)-of-(?P<count>\d+)|/\d+)?\.parquet"
)


def _split_paths(paths: dict[str, FileRef] | dict[str, RemoteFile], config: str, split: str) -> list[str]:
    folders = {config, "data"} if config == "default" else {config}
    return [
        path
        for path in sorted(paths)
        if (match := _FILE.fullmatch(path)) and match["config"] in folders and match["split"] == split
    ]


def _announced(paths: list[str]) -> int:
    """How many files the split has in all, as its file names say (``-of-00004``)."""
    match = _FILE.fullmatch(paths[0])
    return int(match["count"]) if match and match["count"] else len(paths)


def _describe(paths: dict[str, RemoteFile]) -> str:
    found = {f"{match['config']}/{match['split']}" for path in paths if (match := _FILE.fullmatch(path))}
    return ", ".join(sorted(found)[:20]) or "no parquet files in a layout that is known"


def _folder(repo: str) -> str:
    return f"datasets/{repo.replace('/', '--')}"


def _record_key(repo: str) -> str:
    return f"{_folder(repo)}/dataset.json"
