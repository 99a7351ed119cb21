"""Word counts of shards in the store: counted once for every distinct way of counting."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import ClassVar

from nanochat.data.shards import ShardError, read_record, shard_path
from nanochat.recipes import Tokenizer
from nanochat.store import ObjectStore
from nanochat.store.documents import Document
from nanochat.store.layout import counts_key
from nanochat.tokenizer_training import count_shard, counted_sha256, counting_digest


class CountsRecord(Document):
    """Which shard's bytes a counts file was made from, and its totals. Written after the file."""

    schema_name: ClassVar[str] = "nanochat.counts"
    shard_sha256: str
    size_bytes: int
    words: int
    unique_words: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """A counts file in the store. `new`: it was made now."""

    key: str
    new: bool
    shard_sha256: str
    words: int
    unique_words: int


def ensure_counts(store: ObjectStore, source: str, shard: str, section: Tokenizer) -> Counted:
    """The shard's counts file, made if it is missing, damaged, or of other bytes.

    A shard that is only recorded by reference is brought from the hub to be counted. Raises ShardError
    where the shard is not in the store or its bytes are not the recorded ones, HubError where the hub
    does not give it, and what `count_shard` raises.
    """
    record = read_record(store, source, shard)
    key = counts_key(counting_digest(section), shard)
    found = _read(store, key)
    info = store.head(key)
    if record and found and info and (found.shard_sha256, found.size_bytes) == (record.sha256, info.size):
        counts = store.local_path(key)
        if counts is None or _is_intact(counts, record.sha256):
            return _counted(key, found, new=False)
    path = shard_path(store, source, shard)
    assert record is not None, "shard_path() has found it"
    with tempfile.TemporaryDirectory(prefix="nanochat-counts-") as folder:
        made = Path(folder) / "counts"
        totals = count_shard(path, made, section)
        sha256 = counted_sha256(made)
        if sha256 != record.sha256:
            raise ShardError(
                f"shard {shard} of {source} is damaged in the store: recorded sha256 {record.sha256}, "
                f"counted {sha256}. Ingest it again with force."
            )
        size = made.stat().st_size
        store.put_file(key, made, move=True)
    counted = CountsRecord(
        shard_sha256=record.sha256,
        size_bytes=size,
        words=totals["words"],
        unique_words=totals["unique_words"],
    )
    store.put(f"{key}.json", counted.to_bytes())
    return _counted(key, counted, new=True)


def _is_intact(counts: Path, shard_sha256: str) -> bool:
    """Whether the file keeps its checksum and says that it counts that shard."""
    try:
        return counted_sha256(counts) == shard_sha256
    except (ValueError, OSError):
        return False


def _counted(key: str, record: CountsRecord, *, new: bool) -> Counted:
    return Counted(
        key=key,
        new=new,
        shard_sha256=record.shard_sha256,
        words=record.words,
        unique_words=record.unique_words,
    )


def _read(store: ObjectStore, key: str) -> CountsRecord | None:
    return CountsRecord.read(store, f"{key}.json") if store.head(f"{key}.json") else None
