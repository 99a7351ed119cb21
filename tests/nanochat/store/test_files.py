"""The folder store: atomic and conditional puts, and keys that cannot leave it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from nanochat.store import FileStore, ObjectNotFound, StoreError, open_store


@pytest.fixture
def store(file_store: FileStore) -> FileStore:
    return file_store


def test_list_shows_whole_objects_only_in_key_order(store: FileStore) -> None:
    for key in ("b/2", "b/1", "c"):
        store.put(key, b"x")
    (store.root / "b" / ".tmp-left-over").write_bytes(b"half")
    (store.root.parent / "beside").write_bytes(b"of somebody else")
    assert [info.key for info in store.list("b/")] == ["b/1", "b/2"]
    assert [info.key for info in store.list("")] == ["b/1", "b/2", "c"]
    assert [info.key for info in store.list("b")] == ["b/1", "b/2"]


def test_a_store_that_cannot_be_written_says_so(tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot write"):
        FileStore(tmp_path / "file").put("a", b"x")


def test_what_cannot_be_fetched_or_deleted_is_said_as_a_failed_put_is(store: FileStore, tmp_path) -> None:
    store.put("a", b"x")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=r"cannot write .*/file/copy: .*Check that the folder is writable"):
        store.fetch("a", tmp_path / "file" / "copy")
    with pytest.raises(
        StoreError, match=r"cannot write /proc/self/status: .*Check that the folder is writable"
    ):
        FileStore(Path("/proc/self")).delete("status")
    store.delete("a/b")  # there is nothing below an object, and absent is fine
    with pytest.raises(ObjectNotFound):
        store.fetch("a/b", tmp_path / "copy")


def test_an_append_of_which_only_a_part_fits_fails_and_leaves_nothing(store: FileStore) -> None:
    store.append("log", b"one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(StoreError, match="cannot write"):
            store.append("log", b"another line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.append("log", b"three\n")
    assert store.get("log") == b"one\nthree\n"


def test_append_adds_whole_lines(store: FileStore) -> None:
    store.append("log", b"one\n")
    store.append("log", b"two\n")
    assert store.get("log") == b"one\ntwo\n"


def test_open_store_takes_paths_and_file_urls(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store(str(tmp_path)).url == tmp_path.as_uri()
    assert open_store(tmp_path.as_uri()).url == tmp_path.as_uri()
    monkeypatch.setenv("NANOCHAT_STORE", str(tmp_path / "x y"))
    store = open_store()
    store.put("a", b"1")
    assert os.path.exists(tmp_path / "x y" / "a")
    assert open_store(store.url).get("a") == b"1"
    with pytest.raises(ValueError, match="gopher"):
        open_store("gopher://x")
    with pytest.raises(ValueError, match=r"Write file:///data/store for an absolute path, or data/store for"):
        open_store("file://data/store")
    assert open_store(f"file://localhost{tmp_path}").url == tmp_path.as_uri()
