"""A store of each kind: a folder, and a bucket of a real S3 server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from standins import s3

from nanochat.store import FileStore, ObjectStore, S3Store

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3Server]:
    if s3.program() is None:
        pytest.skip("versitygw, the S3 server of tests, is not installed")
    with s3.serve(tmp_path_factory.mktemp("s3") / "data") as server:
        yield server


@pytest.fixture
def reachable(s3_server: s3.S3Server, monkeypatch: pytest.MonkeyPatch) -> s3.S3Server:
    """The server, with what boto3 needs to reach it in the environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_store(reachable: s3.S3Server) -> S3Store:
    return S3Store(s3.BUCKET, f"runs/{next(_numbers)}")


@pytest.fixture
def file_store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@pytest.fixture(params=["file_store", "s3_store"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each kind in turn."""
    return request.getfixturevalue(request.param)
