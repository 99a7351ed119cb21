from __future__ import annotations

import resource
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.prose.installation import Origin, SourceFile, origins
from nanochat.data.shards import ingest_shards, require_shards, shard_path, verify_shard
from nanochat.data.sources import SourceError
from nanochat.data.sources.offline import (
    TRAINING_SHARDS,
    VALIDATION_SHARD,
    OfflineSource,
    gather,
    holds_documents,
    read_corpus,
    read_offline_documents,
    split_documents,
    write_corpus,
)
from nanochat.store import FileStore, StoreError

ALL = (*TRAINING_SHARDS, VALIDATION_SHARD)


def write_module(path: Path, source: str) -> Path:
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def installation(folder: Path, modules: int = 120, version: str = "1.0") -> list[Origin]:
    """A package whose modules each document themselves and one function."""
    files = []
    for index in range(modules):
        path = write_module(
            folder / f"m{index}.py",
            f'''
            """Module number {index} of a package that exists for the sake of this test."""
            def function():
                """Return the number {index}, which is what the function of module {index} is for."""
            ''',
        )
        files.append(SourceFile(str(path), f"package.m{index}"))
    return [Origin("package", version, tuple(files), readme="# package\n\nA package that is read by a test.")]


def small_source(folder: Path, version: str = "1.0") -> OfflineSource:
    folder.mkdir(exist_ok=True)
    return OfflineSource(installation=lambda: installation(folder, version=version), min_bytes=1_000)


def test_every_text_is_kept_once_whatever_its_case_and_white_space(tmp_path: Path) -> None:
    first = write_module(tmp_path / "a.py", '"""The same sentence in two modules of a package."""')
    second = write_module(tmp_path / "b.py", '"""THE same sentence\nin two modules of a package."""')
    files = (SourceFile(str(first), "a"), SourceFile(str(second), "b"))
    (document,) = gather([Origin("package", "1", files)])
    assert (document.module, document.name, document.kind) == ("a", "", "docstring")


def test_the_corpus_stops_at_its_size(tmp_path: Path) -> None:
    found = gather(installation(tmp_path), max_bytes=2_000)
    assert 1_800 < sum(len(document.text) for document in found) <= 2_000


def test_no_module_straddles_training_and_validation_and_no_document_is_lost(tmp_path: Path) -> None:
    found = gather(installation(tmp_path, modules=400))
    split = split_documents(found)
    assert tuple(split) == ALL
    validation = {document.module for document in split[VALIDATION_SHARD]}
    training = {document.module for key in TRAINING_SHARDS for document in split[key]}
    assert not validation & training
    assert 4 <= len(validation) <= 24
    assert sum(map(len, split.values())) == len(found)


def test_one_installation_gives_one_corpus_and_another_gives_another(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    sources = installation(tmp_path / "a")
    first = write_corpus(tmp_path / "a", sources, min_bytes=1)
    assert write_corpus(tmp_path / "b", sources, min_bytes=1) == first
    write_module(Path(sources[0].files[3].path), '"""A module that says something else than before."""')
    assert write_corpus(tmp_path / "c", sources, min_bytes=1).digest != first.digest


def test_too_little_text_is_refused_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"0\.0 MB of text; it needs 5 MB.*package"):
        write_corpus(tmp_path, installation(tmp_path))


def test_the_corpus_is_gathered_once_recorded_and_read_back(tmp_path: Path, tmp_store: FileStore) -> None:
    source = small_source(tmp_path / "package")
    report = ingest_shards(tmp_store, source, source.training_shards())
    assert [record.shard for record in report.landed] == list(TRAINING_SHARDS)
    corpus = read_corpus(tmp_store)
    assert corpus is not None
    assert corpus.documents == 241
    assert corpus.origins["package"].version == "1.0"
    assert {record.revision for record in report.landed} == {corpus.digest}
    assert {record.shard: record.sha256 for record in report.landed} == {
        key: corpus.shards[key].sha256 for key in TRAINING_SHARDS
    }
    # The validation shard was written with the others: no second gathering, even of another package.
    other = small_source(tmp_path / "other")
    (validation,) = ingest_shards(tmp_store, other, [VALIDATION_SHARD]).landed
    assert validation.revision == corpus.digest
    paths = [shard_path(tmp_store, "offline", key) for key in ALL]
    read = list(read_offline_documents(paths))
    assert len(read) == corpus.documents
    assert {document.kind for document in read} == {"docstring", "readme"}


def test_a_recorded_corpus_is_kept_until_asked_for_a_newer_one(tmp_path: Path, tmp_store: FileStore) -> None:
    source = small_source(tmp_path / "package")
    (old,) = ingest_shards(tmp_store, source, TRAINING_SHARDS[:1]).landed
    changed = OfflineSource(installation=lambda: installation(tmp_path / "package", 150), min_bytes=1_000)
    assert ingest_shards(tmp_store, changed, TRAINING_SHARDS[:1]).landed == ()
    (new,) = ingest_shards(tmp_store, changed, TRAINING_SHARDS[:1], refresh=True).landed
    assert new.revision != old.revision
    assert verify_shard(tmp_store, new) is None
    assert len(ingest_shards(tmp_store, changed, TRAINING_SHARDS[:1], refresh=True).skipped) == 1


def test_lost_and_damaged_shards_are_made_again(tmp_path: Path, tmp_store: FileStore) -> None:
    source = small_source(tmp_path / "package")
    records = ingest_shards(tmp_store, source, TRAINING_SHARDS).landed
    tmp_store.delete(records[0].key)
    tmp_store.put(records[1].key, b"damaged")
    report = ingest_shards(tmp_store, source, TRAINING_SHARDS)
    assert [record.shard for record in report.landed] == list(TRAINING_SHARDS[:2])
    assert [
        verify_shard(tmp_store, record) for record in require_shards(tmp_store, source, TRAINING_SHARDS)
    ] == ([None] * 8)


def test_a_lost_shard_of_another_installation_is_refused_with_the_difference(
    tmp_path: Path, tmp_store: FileStore
) -> None:
    (record,) = ingest_shards(tmp_store, small_source(tmp_path / "package"), TRAINING_SHARDS[:1]).landed
    tmp_store.delete(record.key)
    other = OfflineSource(
        installation=lambda: installation(tmp_path / "package", 150, version="2.0"), min_bytes=1_000
    )
    report = ingest_shards(tmp_store, other, TRAINING_SHARDS[:1])
    assert "another installation" in report.failed["offline_00000"]
    assert "package 1.0 → 2.0" in report.failed["offline_00000"]


def test_what_cannot_be_made_again_is_gathered_once_and_not_for_every_shard(
    tmp_path: Path, tmp_store: FileStore
) -> None:
    gathered = []

    def changed() -> Sequence[Origin]:
        gathered.append(1)
        return installation(tmp_path / "package", 150)

    for record in ingest_shards(tmp_store, small_source(tmp_path / "package"), TRAINING_SHARDS).landed:
        tmp_store.delete(record.key)
    report = ingest_shards(tmp_store, OfflineSource(installation=changed, min_bytes=1_000), TRAINING_SHARDS)
    assert list(report.failed) == list(TRAINING_SHARDS)
    assert len(set(report.failed.values())) == len(gathered) == 1


def test_a_corpus_that_cannot_be_written_is_said_as_the_store_says_it(
    tmp_path: Path, tmp_store: FileStore
) -> None:
    source = small_source(tmp_path / "package")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    source.installation()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(StoreError, match=r"the offline corpus: cannot write .*the disk is not full"):
            source.pin(tmp_store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_reading_process_that_dies_is_told_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = installation(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SourceError, match=r"cannot be gathered: .* ended with status 1"):
        gather(sources)


def test_a_file_of_texts_alone_has_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"text": ["words"]}), path)
    with pytest.raises(SourceError, match=r"plain\.parquet: has not the columns text, source, module"):
        list(read_offline_documents([path]))
    assert not holds_documents(path)
    row = {"source": "p", "module": "m", "name": "", "kind": "docstring", "part": 0}
    pq.write_table(pa.Table.from_pylist([{"text": text, **row} for text in ("a", None, " ")]), path)
    assert holds_documents(path)
    assert [document.text for document in read_offline_documents([path])] == ["a"]


def _processor_s() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(
        resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def test_this_installation_gives_five_to_twenty_megabytes_in_less_than_a_minute_of_work(
    tmp_path: Path,
) -> None:
    before = _processor_s()
    corpus = write_corpus(tmp_path, origins())
    after = _processor_s()
    assert 5e6 <= corpus.text_bytes <= 20e6
    assert corpus.origins["python"].documents > 3_000
    validation = corpus.shards[VALIDATION_SHARD].text_bytes / corpus.text_bytes
    assert 0.01 < validation < 0.06
    # Processor time, not the clock: other tests run beside this one.
    assert after - before < 60
    texts = [
        document.text for document in read_offline_documents([tmp_path / f"{key}.parquet" for key in ALL])
    ]
    assert len(set(texts)) == len(texts) == corpus.documents
