"""The S3 store against a real server: atomic and conditional puts, chunks, and errors by name."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import botocore.auth
import pytest
from standins import plain_s3, s3, s3_faults

from nanochat.store import PreconditionFailed, StoreError, open_store
from nanochat.store.leases import LeaseHeld, LeaseKeeper
from nanochat.store.s3 import S3Store


@pytest.fixture
def store(s3_store: S3Store) -> S3Store:
    return s3_store


def test_what_is_appended_has_one_writer(store: S3Store) -> None:
    store.append("events.jsonl", b"one\n")
    open_store(store.url).append("events.jsonl", b"two\n")
    with pytest.raises(PreconditionFailed):
        store.append("events.jsonl", b"twin\n")


def test_an_upload_that_was_never_completed_is_no_object(store: S3Store, reachable: s3.S3Server) -> None:
    client = boto3.client("s3")
    key = f"{store.url.removeprefix(f's3://{s3.BUCKET}/')}/weights"
    upload = client.create_multipart_upload(Bucket=s3.BUCKET, Key=key)["UploadId"]
    client.upload_part(Bucket=s3.BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 6_000_000)
    assert store.head("weights") is None
    assert list(store.list("")) == []


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


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[plain_s3.PlainS3]:
    with plain_s3.serve() as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield service


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access denied. The key needs s3:GetObject, s3:PutObject"),
        (404, "NoSuchBucket", "no such bucket. Create it, or correct NANOCHAT_STORE"),
        (403, "RequestTimeTooSkewed", r"clock is off by more than the service allows. Set it \(NTP\)"),
        (400, "ExpiredToken", r"session token has expired. Get a new one \(aws sso login"),
    ],
)
@pytest.mark.parametrize("call", ["head", "get", "put", "list"])
def test_each_refusal_has_its_own_words_whatever_was_asked(
    plain: plain_s3.PlainS3, status: int, code: str, message: str, call: str
) -> None:
    plain.error = (status, code)
    store = S3Store(plain_s3.BUCKET)
    calls = {
        "head": lambda: store.head("a"),
        "get": lambda: store.get("a"),
        "put": lambda: store.put("a", b"x"),
        "list": lambda: list(store.list("")),
    }
    if (call, code) == ("head", "NoSuchBucket"):  # as that of an absent object; the first write tells
        assert store.head("a") is None
        return
    with pytest.raises(StoreError, match=message):
        calls[call]()


def test_a_clock_that_is_wrong_is_refused_by_a_real_server_and_named(
    reachable: s3.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = datetime.timedelta(hours=1)
    right = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: right(*a, **k) - hour)
    with pytest.raises(StoreError, match="this machine's clock is off"):
        S3Store(s3.BUCKET).head("a")


def test_a_login_that_has_run_out_is_no_network_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"no usable credentials: .*nobody.*AWS_PROFILE"):
        S3Store("bucket").get("a")


def test_a_real_server_keeps_conditions_and_the_probe_leaves_nothing(store: S3Store) -> None:
    assert store.caveat() is None
    assert list(S3Store(s3.BUCKET).list("probe/")) == []


@pytest.mark.parametrize("refuses", [False, True])
def test_a_store_without_conditional_puts_is_found_out_once_and_read_before_it_is_written(
    plain: plain_s3.PlainS3, refuses: bool
) -> None:
    plain.refuses = refuses
    store = S3Store(plain_s3.BUCKET, "runs")
    etag = store.put("a", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("a", b"2", if_absent=True)
    newer = store.put("a", b"2", if_match=etag)
    with pytest.raises(PreconditionFailed):
        store.put("a", b"3", if_match=etag)
    assert store.get("a") == b"2"
    assert newer != etag
    probes = [request for request in plain.requests if "/probe/" in request]
    again = S3Store(plain_s3.BUCKET, "runs")
    assert "protects one orchestrator from itself only" in str(again.caveat())
    assert [request for request in plain.requests if "/probe/" in request] == probes
    assert list(plain.objects) == ["runs/a"]


def test_one_holder_at_a_time_has_a_lease_in_a_store_without_conditional_puts(
    plain: plain_s3.PlainS3,
) -> None:
    store = S3Store(plain_s3.BUCKET, "runs")
    taken = []

    def take(number: int) -> None:
        keeper = LeaseKeeper(store, "lease.json", token=f"t{number}", owner=f"run {number}", ttl_s=30.0)
        try:
            keeper.take()
        except LeaseHeld:
            return
        taken.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(8)))
    assert len(taken) == 1


def test_a_probe_whose_answer_is_lost_finds_that_conditions_are_kept(
    reachable: s3.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_faults.proxy(reachable.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        lost = proxy.add("lost_answer", match="PUT .*/probe/", times=1)
        store = S3Store(s3.BUCKET, "lost-answers")
        store.put("a", b"1", if_absent=True)
        assert lost.hits == 1
        assert store.caveat() is None
        with pytest.raises(PreconditionFailed):
            store.put("a", b"2", if_absent=True)
