"""What every store keeps, a folder as well as a bucket: atomic and conditional puts, appends, keys."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from nanochat.store import ObjectNotFound, ObjectStore, PreconditionFailed, open_store
from nanochat.store.leases import LeaseHeld, LeaseKeeper


def test_what_is_put_is_got(store: ObjectStore) -> None:
    etag = store.put("a/b.json", b"one")
    info = store.head("a/b.json")
    assert info is not None
    assert (store.get("a/b.json"), info.size, info.etag) == (b"one", 3, etag)


def test_its_url_opens_it(store: ObjectStore) -> None:
    store.put("a", b"1")
    opened = open_store(store.url)
    assert (opened.get("a"), opened.url) == (b"1", store.url)


def test_a_missing_object_is_named(store: ObjectStore, tmp_path: Path) -> None:
    for ask in (lambda: store.get("a/b"), lambda: store.fetch("a/b", tmp_path / "folder" / "copy")):
        with pytest.raises(ObjectNotFound, match="no object 'a/b'"):
            ask()
    assert store.head("a/b") is None
    store.delete("a/b")
    assert not list(tmp_path.glob("folder/*"))


def test_conditional_puts_win_once(store: ObjectStore) -> None:
    first = store.put("k", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("k", b"2", if_absent=True)
    second = store.put("k", b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put("k", b"3", if_match=first)
    assert store.get("k") == b"2"
    store.delete("k")
    with pytest.raises(PreconditionFailed):
        store.put("k", b"3", if_match=second)


def test_of_many_conditional_puts_at_once_one_wins(store: ObjectStore) -> None:
    etag = store.put("k", b"0")
    outcomes: list[str] = []

    def attempt(number: int) -> None:
        try:
            store.put("k", str(number).encode(), if_match=etag)
            outcomes.append("won")
        except PreconditionFailed:
            outcomes.append("lost")

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


def test_a_lease_has_one_holder(store: ObjectStore) -> None:
    first = LeaseKeeper(store, "lease.json", token="one", owner="first", ttl_s=60)
    second = LeaseKeeper(store, "lease.json", token="two", owner="second", ttl_s=60)
    first.take()
    with pytest.raises(LeaseHeld, match="first"):
        second.take()
    first.renew()
    first.release()
    assert second.take().token == "two"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/.", "a\\b", "a\0b"])
def test_a_key_cannot_leave_the_store(store: ObjectStore, key: str) -> None:
    with pytest.raises(ValueError, match="not a store key"):
        store.put(key, b"x")


def test_objects_are_listed_in_key_order(store: ObjectStore) -> None:
    for key in ("b/2", "b/1", "c"):
        store.put(key, b"x")
    assert [info.key for info in store.list("b/")] == ["b/1", "b/2"]
    assert [info.key for info in store.list("b")] == ["b/1", "b/2"]
    assert [info.key for info in store.list("")] == ["b/1", "b/2", "c"]


def test_a_large_file_comes_back_whole(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(bytes(range(256)) * 160_000)  # several parts of a transfer
    store.put_file("big", source)
    assert store.fetch("big", tmp_path / "out" / "copy").read_bytes() == source.read_bytes()
    store.put_file("moved", source, move=True)
    assert not source.exists()
    assert [info.key for info in store.list("")] == ["big", "moved"]


def test_lines_are_appended_and_read_from_an_offset(store: ObjectStore) -> None:
    assert store.read_appended("events.jsonl", 0) == b""
    store.append("events.jsonl", b"one\n")
    store.append("events.jsonl", b"two\n")
    another_process = open_store(store.url)
    assert another_process.read_appended("events.jsonl", 0) == b"one\ntwo\n"
    assert another_process.read_appended("events.jsonl", 4) == b"two\n"
    assert another_process.read_appended("events.jsonl", 8) == b""
    another_process.append("events.jsonl", b"three\n")
    assert store.read_appended("events.jsonl", 8) == b"three\n"
