"""The S3 store against a real server: atomic and conditional puts, chunks, and errors by name."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from standins import s3

from nanochat.store import ObjectNotFound, PreconditionFailed, StoreError, open_store
from nanochat.store.leases import LeaseHeld, LeaseKeeper
from nanochat.store.s3 import S3Store

pytestmark = pytest.mark.skipif(
    s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    with s3.serve(tmp_path_factory.mktemp("s3") / "data") as server:
        yield server


@pytest.fixture
def reachable(server: s3.S3Server, monkeypatch: pytest.MonkeyPatch) -> s3.S3Server:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


_numbers = itertools.count()


@pytest.fixture
def store(reachable: s3.S3Server) -> S3Store:
    return S3Store(s3.BUCKET, f"runs/{next(_numbers)}")


def test_what_is_put_is_got(store: S3Store) -> None:
    etag = store.put("a/b.json", b"one")
    info = store.head("a/b.json")
    assert info is not None
    assert (store.get("a/b.json"), info.size, info.etag) == (b"one", 3, etag)


def test_a_url_opens_the_same_store(store: S3Store) -> None:
    store.put("a", b"1")
    opened = open_store(store.url)
    assert (opened.get("a"), opened.url) == (b"1", store.url)


def test_a_missing_object_is_named(store: S3Store, tmp_path: Path) -> None:
    for ask in (lambda: store.get("a/b"), lambda: store.fetch("a/b", tmp_path / "copy")):
        with pytest.raises(ObjectNotFound, match="no object 'a/b'"):
            ask()
    assert store.head("a/b") is None
    store.delete("a/b")
    assert list(tmp_path.iterdir()) == []


def test_conditional_puts_win_once(store: S3Store) -> None:
    first = store.put("k", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("k", b"2", if_absent=True)
    second = store.put("k", b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put("k", b"3", if_match=first)
    store.delete("k")
    with pytest.raises(PreconditionFailed):
        store.put("k", b"3", if_match=second)


def test_of_many_conditional_puts_at_once_one_wins(store: S3Store) -> None:
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


def test_a_lease_has_one_holder(store: S3Store) -> None:
    first = LeaseKeeper(store, "lease.json", token="one", owner="first", ttl_s=60)
    second = LeaseKeeper(store, "lease.json", token="two", owner="second", ttl_s=60)
    first.take()
    with pytest.raises(LeaseHeld, match="first"):
        second.take()
    first.renew()
    first.release()
    assert second.take().token == "two"


def test_a_large_file_goes_in_parts_and_comes_back_whole(store: S3Store, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(bytes(range(256)) * 160_000)
    store.put_file("big", source)
    assert store.fetch("big", tmp_path / "out" / "copy").read_bytes() == source.read_bytes()
    store.put_file("moved", source, move=True)
    assert not source.exists()
    assert [info.key for info in store.list("")] == ["big", "moved"]


def test_an_upload_that_was_never_completed_is_no_object(store: S3Store, reachable: s3.S3Server) -> None:
    client = boto3.client("s3")
    key = f"{store.url.removeprefix(f's3://{s3.BUCKET}/')}/weights"
    upload = client.create_multipart_upload(Bucket=s3.BUCKET, Key=key)["UploadId"]
    client.upload_part(Bucket=s3.BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 6_000_000)
    assert store.head("weights") is None
    assert list(store.list("")) == []


def test_lines_are_appended_in_chunks_and_read_from_an_offset(store: S3Store) -> None:
    store.append("events.jsonl", b"one\n")
    store.append("events.jsonl", b"two\n")
    another_process = open_store(store.url)
    assert another_process.read_appended("events.jsonl", 0) == b"one\ntwo\n"
    assert another_process.read_appended("events.jsonl", 4) == b"two\n"
    assert another_process.read_appended("events.jsonl", 8) == b""
    another_process.append("events.jsonl", b"three\n")
    assert store.read_appended("events.jsonl", 8) == b"three\n"
    with pytest.raises(PreconditionFailed):
        store.append("events.jsonl", b"twin\n")  # one writer owns it


def test_nothing_appended_yet_is_nothing_to_read(store: S3Store) -> None:
    assert store.read_appended("events.jsonl", 0) == b""


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/."])
def test_a_key_cannot_leave_the_store(store: S3Store, key: str) -> None:
    with pytest.raises(ValueError, match="not a store key"):
        store.put(key, b"x")


@pytest.mark.parametrize(
    ("environment", "bucket", "message"),
    [
        ({}, "no-such-bucket", "no such bucket. Create it, or correct NANOCHAT_STORE"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, s3.BUCKET, "Check AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, s3.BUCKET, "access key is unknown"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, s3.BUCKET, "Check the network and AWS_ENDPOINT_URL"),
    ],
)
def test_what_is_wrong_is_said_with_the_next_step(
    reachable: s3.S3Server,
    environment: dict[str, str],
    bucket: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=message):
        S3Store(bucket).put("a", b"x")


def test_no_credentials_are_named(
    reachable: s3.S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="no credentials"):
        S3Store(s3.BUCKET).get("a")
