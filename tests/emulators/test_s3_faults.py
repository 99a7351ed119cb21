"""The S3 proxy: a real client through it, to a real server, and what is lost on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from standins import s3, s3_faults

_BYTES = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    if s3.program() is None:
        pytest.skip("versitygw is not installed")
    with s3.serve(tmp_path_factory.mktemp("s3") / "data") as running:
        yield running


@pytest.fixture
def proxy(server: s3.S3Server) -> Iterator[s3_faults.S3FaultProxy]:
    with s3_faults.proxy(server.endpoint) as running:
        yield running


@pytest.fixture
def client() -> Callable[..., Any]:
    """`client(url, attempts=1)`: a client with the right key."""

    def make(url: str, *, attempts: int = 1, secret: str = s3.SECRET_KEY) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=s3.ACCESS_KEY,
            aws_secret_access_key=secret,
            region_name="us-east-1",
            config=Config(
                retries={"total_max_attempts": attempts, "mode": "standard"},
                read_timeout=2,
                connect_timeout=2,
            ),
        )

    return make


def test_requests_pass_unchanged_and_are_verified(proxy, client, tmp_path: Path):
    bucket = client(proxy.url)
    bucket.put_object(Bucket=s3.BUCKET, Key="a/key with space", Body=_BYTES)
    assert bucket.get_object(Bucket=s3.BUCKET, Key="a/key with space")["Body"].read() == _BYTES
    large = tmp_path / "large"
    large.write_bytes(_BYTES * 100)
    bucket.upload_file(str(large), s3.BUCKET, "large")
    bucket.download_file(s3.BUCKET, "large", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    with pytest.raises(ClientError, match="PreconditionFailed"):
        bucket.put_object(Bucket=s3.BUCKET, Key="large", Body=b"", IfNoneMatch="*")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client(proxy.url, secret="wrong").list_objects_v2(Bucket=s3.BUCKET)
    assert "GET /nanochat/a/key%20with%20space" in proxy.requests


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
def test_a_status_is_answered_as_often_as_it_was_ordered(proxy, client, status: int, code: str):
    fault = proxy.add("status", match=r"^PUT .*/here$", status=status, times=2)
    bucket = client(proxy.url)
    bucket.put_object(Bucket=s3.BUCKET, Key="elsewhere", Body=b"1")
    for _ in range(2):
        with pytest.raises(ClientError, match=code):
            bucket.put_object(Bucket=s3.BUCKET, Key="here", Body=_BYTES)
    bucket.put_object(Bucket=s3.BUCKET, Key="here", Body=_BYTES)
    assert fault.hits == 2
    assert bucket.get_object(Bucket=s3.BUCKET, Key="here")["Body"].read() == _BYTES


def test_a_client_that_tries_again_gets_through(proxy, client):
    fault = proxy.add("status", status=503, times=2)
    client(proxy.url, attempts=3).put_object(Bucket=s3.BUCKET, Key="again", Body=_BYTES)
    assert fault.hits == 2


def test_a_reset_connection_has_done_nothing_and_a_lost_answer_has(proxy, client):
    bucket = client(proxy.url)
    proxy.add("reset", match="/never")
    with pytest.raises(HTTPClientError):
        bucket.put_object(Bucket=s3.BUCKET, Key="never", Body=b"1")
    with pytest.raises(ClientError, match="404"):
        bucket.head_object(Bucket=s3.BUCKET, Key="never")
    proxy.add("lost_answer", match="/done")
    with pytest.raises(HTTPClientError):
        bucket.put_object(Bucket=s3.BUCKET, Key="done", Body=b"1")
    assert bucket.head_object(Bucket=s3.BUCKET, Key="done")["ContentLength"] == 1


def test_half_a_body_is_noticed(proxy, client):
    bucket = client(proxy.url)
    bucket.put_object(Bucket=s3.BUCKET, Key="half", Body=_BYTES)
    proxy.add("truncate", match="^GET .*/half")
    with pytest.raises(Exception, match=r"(?i)incomplete|broken|read"):
        bucket.get_object(Bucket=s3.BUCKET, Key="half")["Body"].read()
    assert bucket.get_object(Bucket=s3.BUCKET, Key="half")["Body"].read() == _BYTES


def test_chance_is_the_same_for_the_same_seed(proxy, client):
    bucket = client(proxy.url)
    bucket.put_object(Bucket=s3.BUCKET, Key="chance", Body=b"1")

    def failures() -> list[int]:
        proxy.clear()
        proxy.add("status", match="^HEAD", status=500, times=None, probability=0.4, seed=7)
        failed = []
        for number in range(25):
            try:
                bucket.head_object(Bucket=s3.BUCKET, Key="chance")
            except ClientError:
                failed.append(number)
        return failed

    assert failures() == failures() != []
    assert len(failures()) < 25


def test_one_client_is_cut_off_and_the_others_are_not(proxy, client):
    cut, other = client(proxy.url_for("cut")), client(proxy.url_for("other"))
    cut.put_object(Bucket=s3.BUCKET, Key="k", Body=b"1")
    proxy.block("cut")
    with pytest.raises(BotoCoreError):
        cut.head_object(Bucket=s3.BUCKET, Key="k")
    other.head_object(Bucket=s3.BUCKET, Key="k")
    proxy.block("cut", "silent")
    start = time.monotonic()
    with pytest.raises(HTTPClientError, match=r"(?i)timeout"):
        cut.head_object(Bucket=s3.BUCKET, Key="k")
    assert time.monotonic() - start > 1.5
    proxy.unblock("cut")
    cut.head_object(Bucket=s3.BUCKET, Key="k")
    assert proxy.port_for("cut") == proxy.port_for("cut") != proxy.port_for("other")
