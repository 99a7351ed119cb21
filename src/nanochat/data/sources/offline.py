"""The `offline` source: the prose that this machine's Python installation carries.

Docstrings of the standard library and of this project's dependencies, the language reference that
`pydoc` ships, and the packages' READMEs, cut into documents, exact duplicates removed (white space
and case apart), in an order that only their content decides. The same installation gives the same
bytes; another one gives another digest. What was gathered is recorded in the store and kept until
somebody asks for a newer corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

import nanochat
from nanochat.data.prose.installation import Origin, origins
from nanochat.data.sources.base import ShardLocation, SourceError
from nanochat.data.staging import Stop, alone, staging_folder
from nanochat.store import ObjectNotFound, ObjectStore, StoreError
from nanochat.store.digests import canonical_json, digest_file
from nanochat.store.documents import Document
from nanochat.store.layout import shard_key, shard_record_key
from nanochat.store.objects import writing

NAME = "offline"
TRAINING_SHARDS = tuple(f"offline_{index:05d}" for index in range(8))
VALIDATION_SHARD = "offline_00008"
CORPUS_KEY = f"shards/{NAME}/corpus.json"

MAX_BYTES = 20_000_000
MIN_BYTES = 5_000_000
VALIDATION_PER_MILLE = 30
# About two rows of the quick model: enough for a row to hold neighbours, little enough for a batch
# to be varied.
PASSAGE_CHARS = 1_500
_ROW_GROUP_ROWS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class OfflineDocument:
    """A document and where it comes from.

    source: ``python`` or a package. module: dotted name; documents of one module are never split
    between training and validation. name: the qualified name of the documented object, "" for the
    module itself. kind: ``docstring``, ``topic`` or ``readme``. part: 0, or which further piece of
    a text too long for one document.
    """

    text: str
    source: str
    module: str
    name: str
    kind: str
    part: int


class CorpusShard(BaseModel):
    """One shard of the corpus, as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size_bytes: int
    sha256: str
    documents: int
    text_bytes: int


class CorpusPart(BaseModel):
    """What one origin gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: str
    documents: int
    text_bytes: int


class Corpus(Document):
    """What was gathered: the digest is that of the documents' content in their order."""

    schema_name: ClassVar[str] = "nanochat.offline_corpus"

    digest: str
    python: str
    origins: dict[str, CorpusPart]
    shards: dict[str, CorpusShard]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards.values())

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards.values())


@dataclasses.dataclass(frozen=True)
class OfflineSource:
    """See the module's text. installation: what there is to read; min_bytes: less is no corpus."""

    name: str = NAME
    has_hub: bool = False
    has_documents: bool = True
    installation: Callable[[], Sequence[Origin]] = origins
    min_bytes: int = MIN_BYTES

    def training_shards(self) -> tuple[str, ...]:
        return TRAINING_SHARDS

    def validation_shard(self) -> str:
        return VALIDATION_SHARD

    def write(self, folder: Path) -> Corpus:
        """Gather the corpus into ``<folder>/<key>.parquet``. Raises what `write_corpus` raises."""
        return write_corpus(folder, self.installation(), min_bytes=self.min_bytes)

    def pin(self, store: ObjectStore, *, refresh: bool = False) -> PinnedOffline:
        """The recorded corpus, else (or with `refresh`) a newly gathered one, put into the store.

        Raises what `write_corpus` raises.
        """
        folder = staging_folder(store, f"shards/{NAME}")
        with alone(store, folder / "corpus.lock"):
            recorded = read_corpus(store)
            if recorded and not refresh:
                return PinnedOffline(self, recorded)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                corpus = self.write(Path(made))
                if recorded and recorded.shards == corpus.shards:
                    return PinnedOffline(self, recorded)
                for shard in corpus.shards:
                    # A record of the shard's earlier content must not outlive it.
                    store.delete(shard_record_key(NAME, shard))
                    store.put_file(shard_key(NAME, shard), Path(made, f"{shard}.parquet"), move=True)
            store.put(CORPUS_KEY, corpus.to_bytes())
            return PinnedOffline(self, corpus)

    def recorded_revision(self, store: ObjectStore) -> str | None:
        corpus = read_corpus(store)
        return corpus.digest if corpus else None


class PinnedOffline:
    """A recorded corpus. Its shards are in the store; one that was lost is made again."""

    def __init__(self, source: OfflineSource, corpus: Corpus) -> None:
        self.source = source
        self.corpus = corpus
        self._lock = threading.Lock()
        self._made: tempfile.TemporaryDirectory[str] | None = None
        self._failure: Exception | None = None

    @property
    def revision(self) -> str:
        return self.corpus.digest

    def locate(self, key: str) -> ShardLocation:
        shard = self.corpus.shards[key]
        return ShardLocation(
            url=f"offline:{self.corpus.digest}/{key}", size_bytes=shard.size_bytes, sha256=shard.sha256
        )

    def fetch(self, key: str, destination: Path, stop: Stop) -> None:
        """Raises SourceError where the installation has changed since the corpus was recorded."""
        with self._lock:
            stop.pause(0)
            if self._failure is not None:  # the next shard would only gather in vain again
                raise self._failure
            if self._made is None:
                try:
                    self._made = self._gather_again()
                except (SourceError, StoreError) as error:
                    self._failure = error
                    raise
            shutil.copyfile(Path(self._made.name, f"{key}.parquet"), destination)

    def _gather_again(self) -> tempfile.TemporaryDirectory[str]:
        made = tempfile.TemporaryDirectory()
        corpus = self.source.write(Path(made.name))
        if corpus.shards != self.corpus.shards:
            raise SourceError(
                f"the recorded offline corpus {self.corpus.digest[:12]} cannot be made again: it came from "
                f"another installation than this one ({corpus.digest[:12]}): "
                f"{_differences(self.corpus, corpus)}. Restore that installation, or ingest with refresh "
                "to record the new corpus (models trained on the old one become stale)."
            )
        return made


def read_corpus(store: ObjectStore) -> Corpus | None:
    """What this store recorded as its offline corpus, or None."""
    try:
        return Corpus.read(store, CORPUS_KEY)
    except ObjectNotFound:
        return None


def gather(sources: Sequence[Origin], *, max_bytes: int = MAX_BYTES) -> list[OfflineDocument]:
    """The documents of `sources` in their order, each text once, up to `max_bytes` of UTF-8."""
    paths = [file.path for origin in sources for file in origin.files]
    docstrings = iter(_read_files(paths))
    seen: set[str] = set()
    kept: list[OfflineDocument] = []
    size = 0
    for origin in sources:
        found = [
            OfflineDocument(text, origin.name, module, name, kind, part)
            for module, name, kind, part, text in origin.other_documents()
        ]
        for file in origin.files:
            found += [
                OfflineDocument(text, origin.name, file.module, name, "docstring", part)
                for name, part, text in next(docstrings)
            ]
        for document in found:
            key = " ".join(document.text.lower().split())
            length = len(document.text.encode())
            if key in seen:
                continue
            if size + length > max_bytes:
                return kept
            seen.add(key)
            size += length
            kept.append(document)
    return kept


def write_corpus(folder: Path, sources: Sequence[Origin], *, min_bytes: int = MIN_BYTES) -> Corpus:
    """Gather what `sources` document and write every shard as ``<folder>/<key>.parquet``.

    Raises SourceError where there is too little text to train on or it cannot be gathered, and
    StoreError where it cannot be written.
    """
    documents = gather(sources)
    size = sum(len(document.text.encode()) for document in documents)
    if size < min_bytes:
        raise SourceError(
            f"the offline corpus has {size / 1e6:.1f} MB of text; it needs {min_bytes / 1e6:.0f} MB. "
            f"Found documentation in: {', '.join(origin.name for origin in sources)}. "
            "Install the project's dependencies (make setup), or train on another source."
        )
    split = split_documents(documents)
    counts = Counter(document.source for document in documents)
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.source] += len(document.text.encode())
    with writing(folder, "the offline corpus"):
        shards = {key: _write_shard(folder / f"{key}.parquet", rows) for key, rows in split.items()}
    return Corpus(
        digest=_content_digest(split),
        python=sys.version.split()[0],
        origins={
            origin.name: CorpusPart(
                version=origin.version, documents=counts[origin.name], text_bytes=sizes[origin.name]
            )
            for origin in sources
            if counts[origin.name]
        },
        shards=shards,
    )


def split_documents(documents: Iterable[OfflineDocument]) -> dict[str, list[OfflineDocument]]:
    """Documents by shard, 3 % of the modules (by the hash of their name) in the validation shard.

    Neighbours stay together: a module's documents are cut into passages of about `PASSAGE_CHARS`
    characters, and within a split the order is that of the passages' digests. So every shard is a
    sample of the whole, and what a row of training text holds belongs together, as prose does.
    """
    training: list[tuple[bytes, list[OfflineDocument]]] = []
    validation: list[tuple[bytes, list[OfflineDocument]]] = []
    for passage in _passages(documents):
        bucket = validation if _is_validation(passage[0].module) else training
        digest = hashlib.sha256("\0".join(document.text for document in passage).encode()).digest()
        bucket.append((digest, passage))
    training.sort(key=lambda item: item[0])
    validation.sort(key=lambda item: item[0])
    count = len(TRAINING_SHARDS)
    bounds = [len(training) * index // count for index in range(count + 1)]
    split = {
        key: [document for _, passage in training[bounds[index] : bounds[index + 1]] for document in passage]
        for index, key in enumerate(TRAINING_SHARDS)
    }
    split[VALIDATION_SHARD] = [document for _, passage in validation for document in passage]
    return split


def _passages(documents: Iterable[OfflineDocument]) -> Iterator[list[OfflineDocument]]:
    passage: list[OfflineDocument] = []
    size = 0
    for document in documents:
        if passage and (document.module != passage[0].module or size >= PASSAGE_CHARS):
            yield passage
            passage, size = [], 0
        passage.append(document)
        size += len(document.text)
    if passage:
        yield passage


_COLUMNS = [field.name for field in dataclasses.fields(OfflineDocument)]


def holds_documents(path: Path) -> bool:
    """Whether a parquet file has the columns of an offline shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return set(_COLUMNS) <= set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return False


def read_offline_documents(paths: Iterable[Path]) -> Iterator[OfflineDocument]:
    """Every document of the given shard files, in order, null and blank ones left out.

    Raises SourceError naming a file that has texts alone.
    """
    import pyarrow.parquet as pq

    for path in paths:
        if not holds_documents(path):
            raise SourceError(
                f"{path.name}: has not the columns {', '.join(_COLUMNS)} that say what its texts document. "
                "Write it like the source's other shards, or leave out the tasks made from documentation."
            )
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=_COLUMNS):
                for row in batch.to_pylist():
                    if row["text"] and not row["text"].isspace():
                        yield OfflineDocument(**row)


def _is_validation(module: str) -> bool:
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4]) % 1000 < VALIDATION_PER_MILLE


def _content_digest(split: dict[str, list[OfflineDocument]]) -> str:
    digest = hashlib.sha256()
    for key, documents in split.items():
        for document in documents:
            digest.update(canonical_json([key, *dataclasses.astuple(document)]))
    return digest.hexdigest()


def _write_shard(path: Path, documents: list[OfflineDocument]) -> CorpusShard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            *(pa.field(name, pa.string()) for name in ("text", "source", "module", "name", "kind")),
            pa.field("part", pa.int32()),
        ]
    )
    rows = [dataclasses.asdict(document) for document in documents]
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=_ROW_GROUP_ROWS, compression="zstd")
    return CorpusShard(
        size_bytes=path.stat().st_size,
        sha256=digest_file(path),
        documents=len(documents),
        text_bytes=sum(len(document.text.encode()) for document in documents),
    )


def _read_files(paths: Sequence[str]) -> list[list[Any]]:
    """What the files document, in the order of `paths`, read by a few worker processes."""
    workers = min(4, os.cpu_count() or 1, 1 + len(paths) // 500)
    by_size = sorted(range(len(paths)), key=lambda index: (-_size(paths[index]), index))
    shares: list[list[int]] = [by_size[start::workers] for start in range(workers)]
    results: list[list[Any]] = [[] for _ in paths]
    with ThreadPoolExecutor(workers) as pool:
        for share, lines in zip(
            shares, pool.map(_run_worker, ([paths[i] for i in share] for share in shares)), strict=True
        ):
            for index, line in zip(share, lines, strict=True):
                results[index] = json.loads(line)
    return results


def _run_worker(paths: list[str]) -> list[bytes]:
    package_root = str(Path(nanochat.__file__).parents[1])
    search = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-m", "nanochat.data.prose.docstrings"],
        input=json.dumps(paths).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    if process.returncode:
        said = process.stderr.decode(errors="replace").strip()[-500:]
        raise SourceError(
            f"the offline corpus cannot be gathered: a process that reads docstrings ended with status "
            f"{process.returncode}{f' ({said})' if said else ''}. A negative status is a signal, -9 mostly a "
            "lack of memory: free some and run it again."
        )
    return process.stdout.splitlines()


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _differences(recorded: Corpus, found: Corpus) -> str:
    changes = [
        f"{name} {_version(recorded, name)} → {_version(found, name)}"
        for name in sorted(recorded.origins.keys() | found.origins.keys())
        if _version(recorded, name) != _version(found, name)
    ]
    return ", ".join(changes) or "the same versions with other files"


def _version(corpus: Corpus, name: str) -> str:
    part = corpus.origins.get(name)
    return part.version if part else "absent"
