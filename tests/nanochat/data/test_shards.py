from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emulators.hub.client import HubEmulator, running_hub

from nanochat.data.counts import ensure_counts
from nanochat.data.hub import HubError
from nanochat.data.shards import (
    ShardError,
    ShardRecord,
    command_for,
    describe_keys,
    ingest_shards,
    read_record,
    require_shards,
    shard_path,
    verified_shard_path,
    verify_shard,
)
from nanochat.data.sources.folder import FolderSource
from nanochat.data.sources.hub import FINEWEB_EDU, HubSource
from nanochat.data.staging import alone
from nanochat.recipes import Tokenizer
from nanochat.store import FileStore, StoreError
from nanochat.store.digests import digest_file

REPO = "someone/words"
SOURCE = HubSource(name="words", repo=REPO, prefix="words", shards=6)
KEYS = SOURCE.training_shards()


def write_shard(path: Path, texts: list[str | None]) -> Path:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=4)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five training shards and one for validation; shard i has i + 1 documents, and a null."""
    folder = tmp_path_factory.mktemp("words")
    for index in range(6):
        write_shard(folder / f"shard_{index:05d}.parquet", [*["word " * 40] * (index + 1), None])
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubEmulator]:
    with running_hub(repos={REPO: folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def downloads(hub: HubEmulator) -> int:
    return sum(r["method"] == "GET" and r["path"].startswith("/storage/") for r in hub.requests())


def keys_of(records: tuple[ShardRecord, ...]) -> list[str]:
    return [record.shard for record in records]


def test_every_shard_lands_verified_and_is_told_of_on_the_calling_thread(
    hub: HubEmulator, tmp_store: FileStore, folder: Path
) -> None:
    told: list[tuple[str, int]] = []
    report = ingest_shards(
        tmp_store,
        SOURCE,
        KEYS,
        threads=3,
        on_landed=lambda record: told.append((record.shard, threading.get_ident())),
    )
    assert keys_of(report.landed) == list(KEYS)
    assert (report.skipped, report.failed) == ((), {})
    assert sorted(told) == [(key, threading.get_ident()) for key in KEYS]
    record = report.landed[2]
    original = folder / "shard_00002.parquet"
    assert (record.rows, record.empty, record.characters) == (4, 1, 3 * 200)
    assert (record.size_bytes, record.sha256) == (original.stat().st_size, digest_file(original))
    assert record.url == f"{hub.url}/datasets/{REPO}/resolve/{record.revision}/shard_00002.parquet"
    assert shard_path(tmp_store, "words", "words_00002").read_bytes() == original.read_bytes()
    assert read_record(tmp_store, "words", "words_00002") == record


def test_a_second_run_downloads_nothing(hub: HubEmulator, tmp_store: FileStore) -> None:
    ingest_shards(tmp_store, SOURCE, KEYS[:2])
    hub.forget()
    report = ingest_shards(tmp_store, SOURCE, KEYS[:2])
    assert (report.landed, keys_of(report.skipped)) == ((), list(KEYS[:2]))
    assert hub.requests() == []


def test_one_bad_shard_does_not_stop_the_others_and_a_re_run_does_only_that_one(
    hub: HubEmulator, tmp_store: FileStore, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"content": ["words"]}), bad)
    good_revision = hub.commit(REPO, "shard_00001.parquet", bad)
    report = ingest_shards(tmp_store, SOURCE, KEYS)
    assert len(report.landed) == 4
    assert list(report.failed) == ["words_00001"]
    assert "shard words_00001 of words: has no column 'text'" in report.failed["words_00001"]
    assert tmp_store.head("shards/words/words_00001.parquet") is None
    assert read_record(tmp_store, "words", "words_00001") is None

    hub.commit(REPO, "shard_00001.parquet", write_shard(tmp_path / "good.parquet", ["words"]))
    again = ingest_shards(tmp_store, SOURCE, KEYS, refresh=True)
    assert again.failed == {}
    assert {record.revision for record in again.landed} != {good_revision}
    assert downloads(hub) == 4 + 1 + 1, "shards that are the same in the new revision are not fetched again"


def test_a_damaged_download_is_fetched_once_more(hub: HubEmulator, tmp_store: FileStore) -> None:
    hub.fault("GET /storage/", "wrong_bytes", after=50)
    report = ingest_shards(tmp_store, SOURCE, KEYS[:1])
    assert keys_of(report.landed) == ["words_00000"]
    assert downloads(hub) == 2


def test_a_download_damaged_twice_fails_naming_both_digests_and_leaves_nothing(
    hub: HubEmulator, tmp_store: FileStore, folder: Path
) -> None:
    hub.fault("GET /storage/", "wrong_bytes", after=50, times=2)
    report = ingest_shards(tmp_store, SOURCE, KEYS[:1])
    reason = report.failed["words_00000"]
    assert digest_file(folder / "shard_00000.parquet") in reason
    assert "got " in reason
    assert list(tmp_store.list("shards/words/words")) == []


def test_a_shard_whose_record_is_lost_is_recorded_again_without_a_download(
    hub: HubEmulator, tmp_store: FileStore
) -> None:
    (record,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    tmp_store.delete("shards/words/words_00000.json")
    (again,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    assert (again.sha256, again.rows) == (record.sha256, record.rows)
    assert downloads(hub) == 1


def test_a_truncated_object_is_fetched_again(hub: HubEmulator, tmp_store: FileStore) -> None:
    (record,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    tmp_store.put(record.key, tmp_store.get(record.key)[:-1])
    (again,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    assert verify_shard(tmp_store, again) is None


def test_a_flipped_byte_in_the_store_is_found_and_force_repairs_it(
    hub: HubEmulator, tmp_store: FileStore
) -> None:
    (record,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    assert verify_shard(tmp_store, record) is None
    data = bytearray(tmp_store.get(record.key))
    data[60] ^= 1
    tmp_store.put(record.key, bytes(data))
    problem = verify_shard(tmp_store, record)
    assert problem is not None
    assert record.sha256 in problem
    assert "force" in problem
    (again,) = ingest_shards(tmp_store, SOURCE, KEYS[:1], force=True).landed
    assert verify_shard(tmp_store, again) is None
    tmp_store.delete(record.key)
    assert "is gone" in (verify_shard(tmp_store, record) or "")


def test_a_damaged_record_counts_as_none(hub: HubEmulator, tmp_store: FileStore) -> None:
    ingest_shards(tmp_store, SOURCE, KEYS[:1])
    tmp_store.put("shards/words/words_00000.json", b"{")
    assert read_record(tmp_store, "words", "words_00000") is None
    assert keys_of(ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed) == ["words_00000"]


def test_the_revision_is_kept_until_somebody_asks_for_a_newer_one(
    hub: HubEmulator, tmp_store: FileStore, tmp_path: Path
) -> None:
    (first,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    newer = hub.commit(REPO, "shard_00001.parquet", write_shard(tmp_path / "new.parquet", ["other words"]))
    (second,) = ingest_shards(tmp_store, SOURCE, KEYS[1:2]).landed
    assert second.revision == first.revision
    report = ingest_shards(tmp_store, SOURCE, KEYS[:2], refresh=True)
    assert {record.revision for record in report.landed} == {newer}
    assert report.landed[0].sha256 == first.sha256
    assert report.landed[1].sha256 != second.sha256


def test_reference_mode_records_what_the_hub_says_and_fetches_no_bytes(
    hub: HubEmulator, tmp_store: FileStore, folder: Path
) -> None:
    (record,) = ingest_shards(tmp_store, SOURCE, KEYS[:1], mode="reference").landed
    assert (record.mode, record.rows, record.characters) == ("reference", None, None)
    assert record.sha256 == digest_file(folder / "shard_00000.parquet")
    assert downloads(hub) == 0
    assert require_shards(tmp_store, SOURCE, KEYS[:1], mode="reference") == [record]
    with pytest.raises(
        ShardError, match=r"1 of 1 shards of words are missing: words_00000 \(only recorded by reference\)"
    ):
        require_shards(tmp_store, SOURCE, KEYS[:1])
    assert keys_of(ingest_shards(tmp_store, SOURCE, KEYS[:1], mode="reference").skipped) == ["words_00000"]
    (copied,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    assert require_shards(tmp_store, SOURCE, KEYS[:1]) == [copied]
    assert keys_of(ingest_shards(tmp_store, SOURCE, KEYS[:1], mode="reference").skipped) == ["words_00000"]


def test_a_shard_recorded_by_reference_is_read_from_a_verified_copy_of_the_hubs(
    hub: HubEmulator, tmp_store: FileStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    ingest_shards(tmp_store, SOURCE, KEYS[:2], mode="reference")
    hub.fault("GET /storage/", "wrong_bytes", after=50)
    path = shard_path(tmp_store, "words", KEYS[1])
    assert path.read_bytes() == (folder / "shard_00001.parquet").read_bytes()
    assert downloads(hub) == 2, "what arrived damaged is fetched once more"
    assert shard_path(tmp_store, "words", KEYS[1]) == path
    assert downloads(hub) == 2
    path.write_bytes(b"torn")
    assert verified_shard_path(tmp_store, "words", KEYS[1]).stat().st_size > 4
    assert downloads(hub) == 3
    hub.fault("GET /storage/", "wrong_bytes", after=50, times=2)
    with pytest.raises(HubError, match=r"shard words_00000 of words \(http.*arrived damaged twice"):
        shard_path(tmp_store, "words", KEYS[0])
    assert list(tmp_store.list("shards/words/words_00000.parquet")) == []


def test_words_are_counted_of_a_shard_that_is_only_recorded(
    hub: HubEmulator, tmp_store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    ingest_shards(tmp_store, SOURCE, KEYS[:1], mode="reference")
    section = Tokenizer(vocab_size=300, shards=1)
    assert ensure_counts(tmp_store, "words", KEYS[0], section).words == 41
    assert not ensure_counts(tmp_store, "words", KEYS[0], section).new
    assert downloads(hub) == 1


class Interrupted(BaseException):
    """As an orchestrator ends a run: raised on the calling thread."""


@pytest.mark.parametrize("waiting_for", ["another run's lock", "the pause before another attempt"])
def test_an_interrupted_ingestion_ends_soon_and_begins_nothing_more(
    hub: HubEmulator, tmp_store: FileStore, folder: Path, waiting_for: str
) -> None:
    def interrupt(record: ShardRecord) -> None:
        raise Interrupted

    SOURCE.pin(tmp_store)
    lock = tmp_store.root / "staging" / "shards" / "words" / "words_00001.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("a") as held:
        if waiting_for == "another run's lock":
            fcntl.flock(held, fcntl.LOCK_EX)
        else:
            sha256 = digest_file(folder / "shard_00001.parquet")
            hub.fault(f"/storage/{sha256}", "cut", after=10, times=100)
        start = time.monotonic()
        with pytest.raises(Interrupted):
            ingest_shards(tmp_store, SOURCE, [KEYS[1], KEYS[0], *KEYS[2:]], threads=2, on_landed=interrupt)
        assert time.monotonic() - start < 3
    hub.forget()
    time.sleep(0.5)
    assert hub.requests() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ingest")]
    assert ingest_shards(tmp_store, SOURCE, KEYS).failed == {}


def test_shards_of_an_older_revision_than_the_recorded_one_are_missing(
    hub: HubEmulator, tmp_store: FileStore, tmp_path: Path
) -> None:
    keys = (*KEYS, SOURCE.validation_shard())
    ingest_shards(tmp_store, SOURCE, keys)
    newer = hub.commit(REPO, "shard_00001.parquet", write_shard(tmp_path / "new.parquet", ["other words"]))
    ingest_shards(tmp_store, SOURCE, KEYS[:2], refresh=True)
    assert len(require_shards(tmp_store, SOURCE, KEYS[:2])) == 2
    with pytest.raises(ShardError) as raised:
        require_shards(tmp_store, SOURCE, KEYS)
    assert "3 of 5 shards of words are missing: words_00002…words_00004 (of revision " in str(raised.value)
    assert f"the source is at {newer[:12]} now" in str(raised.value)
    with pytest.raises(ShardError, match=r"words_00005 \(of revision .*`dg launch --assets validation_files"):
        require_shards(tmp_store, SOURCE, [SOURCE.validation_shard()], mode="reference")
    hub.forget()
    assert ingest_shards(tmp_store, SOURCE, keys).failed == {}
    assert downloads(hub) == 0, "they are the same in the new revision"
    assert {record.revision for record in require_shards(tmp_store, SOURCE, keys)} == {newer}


def test_a_record_of_another_shard_counts_as_none(hub: HubEmulator, tmp_store: FileStore) -> None:
    ingest_shards(tmp_store, SOURCE, KEYS[:2])
    tmp_store.put("shards/words/words_00000.json", tmp_store.get("shards/words/words_00001.json"))
    assert read_record(tmp_store, "words", "words_00000") is None
    (again,) = ingest_shards(tmp_store, SOURCE, KEYS[:1]).landed
    assert (again.shard, verify_shard(tmp_store, again)) == ("words_00000", None)
    body = json.loads(tmp_store.get("shards/words/words_00000.json"))
    tmp_store.put("shards/words/words_00000.json", json.dumps({**body, "source": "other"}).encode())
    assert read_record(tmp_store, "words", "words_00000") is None


def test_a_shard_is_refused_with_what_is_wrong_and_leaves_the_others_alone(
    tmp_path: Path, tmp_store: FileStore
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("blank", "fine", "flipped", "latin", "nulls", "other", "truncated", "validation"):
        write_shard(folder / f"{name}.parquet", ["some words"] * 50)
    whole = (folder / "fine.parquet").read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.parquet").write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])
    write_shard(folder / "blank.parquet", ["", None, " "])
    write_shard(folder / "nulls.parquet", [None, "", "words"])
    pq.write_table(pa.table({"content": ["words"]}), folder / "other.parquet")
    latin = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"f\xfcr"))
    pq.write_table(pa.table({"text": latin}), folder / "latin.parquet")
    source = FolderSource("texts", folder)
    report = ingest_shards(tmp_store, source, source.training_shards())
    assert keys_of(report.landed) == ["texts_fine", "texts_nulls"]
    assert {key: reason.partition(": ")[0] for key, reason in report.failed.items()} == {
        key: f"shard {key} of texts"
        for key in ("texts_blank", "texts_flipped", "texts_latin", "texts_other", "texts_truncated")
    }
    reasons = " ".join(report.failed.values())
    for reason in ("has no text (3 rows", "not UTF-8", "no column 'text'", "not a readable parquet"):
        assert reason in reasons
    assert {record.shard: (record.rows, record.empty) for record in report.landed} == {
        "texts_fine": (50, 0),
        "texts_nulls": (3, 2),
    }


def test_a_store_that_cannot_be_written_is_named_with_the_next_step(hub: HubEmulator, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    SOURCE.pin(store)
    (tmp_path / "store" / "staging").write_text("where a folder should be")
    report = ingest_shards(store, SOURCE, KEYS[:1])
    assert "cannot write" in report.failed["words_00000"]
    assert "point NANOCHAT_STORE at another place" in report.failed["words_00000"]
    with pytest.raises(StoreError, match="cannot write"), alone(store, tmp_path / "store" / "shards"):
        pass


def test_two_runs_that_want_the_same_shard_fetch_it_once(hub: HubEmulator, tmp_store: FileStore) -> None:
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: ingest_shards(tmp_store, SOURCE, KEYS[:1]), range(2)))
    assert sorted(len(report.landed) for report in reports) == [0, 1]
    assert downloads(hub) == 1


def test_a_shard_the_source_does_not_have_is_refused_before_anything_is_fetched(
    hub: HubEmulator, tmp_store: FileStore
) -> None:
    with pytest.raises(ShardError, match=r"no shard words_00009; its shards are words_00000…words_00004 and"):
        ingest_shards(tmp_store, SOURCE, [KEYS[0], "words_00009"])
    assert hub.requests() == []


def test_missing_shards_are_named_as_ranges_with_the_command_that_gets_them(tmp_store: FileStore) -> None:
    keys = [*FINEWEB_EDU.training_shards()[:8], "shard_00100"]
    with pytest.raises(ShardError) as raised:
        require_shards(tmp_store, FINEWEB_EDU, keys)
    assert "9 of 9 shards of fineweb-edu are missing: shard_00000…shard_00007, shard_00100" in str(
        raised.value
    )
    assert "`dg launch --job ingest_shards --partition-range shard_00000...shard_00100`" in str(raised.value)
    assert describe_keys(["shard_00003", "shard_01822", "shard_00001"], FINEWEB_EDU) == (
        "shard_00001, shard_00003, shard_01822"
    )
    assert command_for(["shard_01822"], FINEWEB_EDU) == (
        "`dg launch --assets validation_files --partition <model>`"
    )


def test_a_shard_that_is_not_here_has_no_path(tmp_store: FileStore) -> None:
    with pytest.raises(
        ShardError, match=r"shard shard_00003 of fineweb-edu is not in the store. Get it: `dg"
    ):
        shard_path(tmp_store, "fineweb-edu", "shard_00003")


@pytest.mark.needs_data
def test_real_shards_come_from_the_fineweb_repository(
    shared_hub: HubEmulator, tmp_store: FileStore, shared_data: Path
) -> None:
    keys = ["shard_00000", "shard_01822"]
    report = ingest_shards(tmp_store, FINEWEB_EDU, keys)
    assert report.failed == {}
    originals = [
        shared_data / "pretrain_text" / name for name in ("shard_00000.parquet", "shard_00006.parquet")
    ]
    assert [record.sha256 for record in report.landed] == [digest_file(path) for path in originals]
    assert [record.rows for record in report.landed] == [9216, 8192]
