"""The S3 store against a real server: atomic and conditional puts, chunks, and errors by name."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
from standins import s3

from nanochat.store import PreconditionFailed, StoreError, open_store
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
