from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.shards import ShardError, ingest_shards, shard_path
from nanochat.data.sources import SourceError, enabled_sources, get_source, load_sources
from nanochat.store import FileStore
from nanochat.store.digests import digest_file


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    folder = tmp_path / "stories"
    folder.mkdir()
    for name in ("part-1", "part-0", "part-2"):
        pq.write_table(pa.table({"text": [f"the story of {name}"]}), folder / f"{name}.parquet")
    (folder / "notes.txt").write_text("not a shard")
    return folder


def test_offline_and_fineweb_are_enabled_by_default() -> None:
    assert [source.name for source in enabled_sources()] == ["offline", "fineweb-edu"]


def test_every_source_names_its_shards_as_published() -> None:
    offline, fineweb = get_source("offline"), get_source("fineweb-edu")
    assert offline.training_shards() == tuple(f"offline_{index:05d}" for index in range(8))
    assert offline.validation_shard() == "offline_00008"
    assert len(fineweb.training_shards()) == 1822
    assert (fineweb.training_shards()[0], fineweb.training_shards()[-1]) == ("shard_00000", "shard_01821")
    assert fineweb.validation_shard() == "shard_01822"
    assert (offline.has_hub, fineweb.has_hub) == (False, True)


def test_the_environment_enables_climbmix_and_folders(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="NANOCHAT_SOURCES=climbmix"):
        get_source("climbmix")
    monkeypatch.setenv("NANOCHAT_SOURCES", f"climbmix, folder:my-stories={stories}")
    names = [source.name for source in enabled_sources()]
    assert names == ["offline", "fineweb-edu", "climbmix", "my-stories"]
    climbmix = get_source("climbmix")
    assert len(climbmix.training_shards()) == 6542
    assert (climbmix.training_shards()[0], climbmix.validation_shard()) == (
        "climbmix_00000",
        "climbmix_06542",
    )
    folder = get_source("my-stories")
    assert folder.training_shards() == ("my-stories_part-0", "my-stories_part-1")
    assert folder.validation_shard() == "my-stories_part-2"


def test_no_two_sources_have_a_shard_of_the_same_name(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_SOURCES", f"climbmix,folder:my-stories={stories}")
    keys = [
        key for source in enabled_sources() for key in (*source.training_shards(), source.validation_shard())
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("wikipedia", "'wikipedia' is not a source. Write climbmix, or folder:"),
        ("folder:stories", "'folder:stories' is not a source"),
        ("folder:My_Stories={stories}", "is not a source"),
        ("folder:offline={stories}", "the name 'offline' is taken"),
        ("folder:a={stories},folder:a={stories}", "two folders are called 'a'"),
        ("folder:a={stories}/nowhere", "nowhere is not a folder"),
    ],
)
def test_a_wrong_entry_of_the_environment_is_named_and_the_others_load(
    entry: str, message: str, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_SOURCES", f"{entry.format(stories=stories)},climbmix")
    book = load_sources()
    assert len(book.errors) == 1
    assert message in book.errors[0]
    assert list(book.sources) in (
        ["offline", "fineweb-edu", "climbmix"],
        ["offline", "fineweb-edu", "a", "climbmix"],
    )
    with pytest.raises(
        SourceError, match=r"unknown source 'pile'\. Enabled sources: offline, .*Left out with"
    ):
        get_source("pile")


def test_a_folder_needs_two_files_with_names_that_can_be_partitions(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_SOURCES", f"folder:stories={stories}")
    (stories / "part-1.parquet").rename(stories / "part...1.parquet")
    (error,) = load_sources().errors
    assert "'part...1.parquet' cannot name a shard; rename it" in error
    for name in ("part...1", "part-2"):
        (stories / f"{name}.parquet").unlink()
    (error,) = load_sources().errors
    assert "has 1 parquet files; at least two" in error


def test_a_folder_is_copied_into_the_store_and_a_changed_file_is_copied_again(
    stories: Path, tmp_store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_SOURCES", f"folder:stories={stories}")
    source = get_source("stories")
    keys = (*source.training_shards(), source.validation_shard())
    report = ingest_shards(tmp_store, source, keys, mode="reference")
    assert [record.mode for record in report.landed] == ["copy"] * 3, "a folder has no hub to refer to"
    assert shard_path(tmp_store, "stories", keys[0]).read_bytes() == (stories / "part-0.parquet").read_bytes()
    assert len(ingest_shards(tmp_store, source, keys).skipped) == 3
    pq.write_table(pa.table({"text": ["another story altogether"]}), stories / "part-1.parquet")
    ingest_shards(tmp_store, source, keys)
    assert digest_file(shard_path(tmp_store, "stories", keys[1])) == digest_file(stories / "part-1.parquet")
    with pytest.raises(ShardError, match="source stories has no shard stories_part-9"):
        ingest_shards(tmp_store, source, ["stories_part-9"])
