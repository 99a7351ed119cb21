from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.counts import ensure_counts
from nanochat.data.shards import ShardError, ShardRecord, ingest_shards
from nanochat.data.sources import get_source
from nanochat.recipes import Tokenizer
from nanochat.store import FileStore
from nanochat.store.digests import digest_bytes

SECTION = Tokenizer(vocab_size=300, shards=1)


@pytest.fixture
def record(tmp_path: Path, tmp_store: FileStore, monkeypatch: pytest.MonkeyPatch) -> ShardRecord:
    """An ingested shard of a folder of the user's."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        table = pa.table({"text": [f"words of {name}", None, ""] * 9})
        pq.write_table(table, folder / f"{name}.parquet", compression="none", use_dictionary=False)
    monkeypatch.setenv("NANOCHAT_SOURCES", f"folder:texts={folder}")
    source = get_source("texts")
    (record,) = ingest_shards(tmp_store, source, source.training_shards()).landed
    return record


def test_a_shard_is_counted_once_for_its_bytes(record: ShardRecord, tmp_store: FileStore) -> None:
    first = ensure_counts(tmp_store, "texts", "texts_a", SECTION)
    assert (first.new, first.words, first.unique_words) == (True, 27, 3)
    assert first.shard_sha256 == record.sha256
    again = ensure_counts(tmp_store, "texts", "texts_a", SECTION)
    assert (again.new, again.words, again.shard_sha256) == (False, 27, record.sha256)


def test_bytes_that_are_not_the_recorded_ones_are_not_counted_under_their_name(
    record: ShardRecord, tmp_store: FileStore
) -> None:
    data = tmp_store.get(record.key)
    changed = data.replace(b"words of a", b"sword of a", 1)
    assert len(changed) == len(data) != 0
    assert changed != data
    tmp_store.put(record.key, changed)
    with pytest.raises(ShardError) as raised:
        ensure_counts(tmp_store, "texts", "texts_a", SECTION)
    for said in ("shard texts_a of texts is damaged", record.sha256, digest_bytes(changed), "with force"):
        assert said in str(raised.value)
    assert list(tmp_store.list("counts/")) == []
