"""Task data: the parquet files of dataset repositories, at a pinned revision, kept in the store."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from nanochat.data.hub import HubError, HubRepo, RemoteFile, fetch_verified
from nanochat.data.staging import alone, staging_folder
from nanochat.store import ObjectNotFound, ObjectStore
from nanochat.store.documents import Document
from nanochat.store.receipts import FileRef


class DatasetRecord(Document):
    """Which revision of a dataset this store uses, and the files it has of it, by path."""

    schema_name: ClassVar[str] = "nanochat.dataset"
    repo: str
    revision: str
    files: dict[str, FileRef] = Field(default_factory=dict)


class HubDatasets:
    """Datasets of a hub as files in a store. A revision is resolved at first use, recorded, and kept until
    `refresh`; files are downloaded once, verified and recorded.

    endpoint: None means ``HF_ENDPOINT``, else the public hub.
    """

    def __init__(self, store: ObjectStore, *, endpoint: str | None = None) -> None:
        self._store = store
        self._endpoint = endpoint
        self._hubs: dict[str, HubRepo] = {}

    def files(self, repo: str, config: str, split: str) -> tuple[FileRef, ...]:
        """The parquet files of e.g. ``files("openai/gsm8k", "main", "train")``, in the store, in the
        dataset's order. Raises HubError where the hub or the dataset does not have it."""
        record = self._record(repo)
        recorded = self._recorded(record, config, split)
        if recorded:
            return recorded
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
        record = self._read(repo)
        return record is not None and bool(self._recorded(record, config, split))

    def revision(self, repo: str, *, refresh: bool = False) -> str:
        """The revision this store uses of a dataset; refresh: take the newest one from now on."""
        return self._record(repo, refresh=refresh).revision

    def _recorded(self, record: DatasetRecord, config: str, split: str) -> tuple[FileRef, ...]:
        """The split's files where the store has all that their names announce, else none."""
        paths = _split_paths(record.files, config, split)
        files = tuple(record.files[path] for path in paths)
        whole = bool(paths) and len(paths) == _announced(paths[0])
        return files if whole and all(map(self._is_there, files)) else ()

    def _record(self, repo: str, *, refresh: bool = False) -> DatasetRecord:
        with alone(self._store, staging_folder(self._store, _folder(repo)) / "record.lock"):
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
        with alone(self._store, folder / "record.lock"):
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
        """Download one file and put it into the store."""
        staged = folder / remote.path.replace("/", "__")
        sha256 = fetch_verified(
            lambda destination: hub.download(remote.path, revision, destination),
            staged,
            size_bytes=remote.size_bytes,
            sha256=remote.sha256,
            what=f"dataset {hub.repo}: {remote.path}",
        )
        key = f"{_folder(hub.repo)}/{revision[:12]}/{remote.path}"
        self._store.put_file(key, staged, move=True)
        return FileRef(key=key, size_bytes=remote.size_bytes, sha256=sha256)

    def _is_there(self, file: FileRef) -> bool:
        info = self._store.head(file.key)
        return info is not None and info.size == file.size_bytes

    def _hub(self, repo: str) -> HubRepo:
        if repo not in self._hubs:
            self._hubs[repo] = HubRepo(repo, endpoint=self._endpoint)
        return self._hubs[repo]


# How the datasets lay out a split: `<config>/<split>-00000-of-00002.parquet`; the config "default"
# lies in `data/`. Every name tells how many files there are, so a part is never taken for the whole.
_FILE = re.compile(r"(?P<config>[^/]+)/(?P<split>[A-Za-z0-9_.]+)-\d+-of-(?P<count>\d+)\.parquet")


def _split_paths(paths: Iterable[str], config: str, split: str) -> list[str]:
    folders = {config, "data"} if config == "default" else {config}
    return [
        path
        for path in sorted(paths)
        if (match := _FILE.fullmatch(path)) and match["config"] in folders and match["split"] == split
    ]


def _announced(path: str) -> int:
    """How many files the split has in all, as each file's name says (``-of-00004``)."""
    match = _FILE.fullmatch(path)
    assert match is not None, "only such paths belong to a split"
    return int(match["count"])


def _describe(paths: Iterable[str]) -> str:
    found = {f"{match['config']}/{match['split']}" for path in paths if (match := _FILE.fullmatch(path))}
    return ", ".join(sorted(found)[:20]) or "no parquet files in a layout that is known"


def _folder(repo: str) -> str:
    return f"datasets/{repo.replace('/', '--')}"


def _record_key(repo: str) -> str:
    return f"{_folder(repo)}/dataset.json"
