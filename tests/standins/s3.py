"""A real S3 server on loopback: versitygw over a folder. Signatures, conditional puts, multipart."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
BUCKET = "nanochat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server with one empty bucket. environment: what boto3 needs to reach it."""

    endpoint: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def program() -> str | None:
    """versitygw on the PATH, or where `.ci/run` puts it; None where it is not installed."""
    beside = Path(__file__).parents[2] / ".tools" / "bin" / "versitygw"
    return shutil.which("versitygw") or (str(beside) if beside.exists() else None)


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """Serve `folder` until the block ends."""
    path = program()
    assert path is not None, "ask program() first"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / BUCKET).mkdir(parents=True)
    with (folder.parent / "s3-server.log").open("wb") as log:
        process = subprocess.Popen(
            [path, "--port", f"127.0.0.1:{port}", "posix", str(folder)],
            env={**os.environ, "ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(port, process)
        yield S3Server(endpoint=f"http://127.0.0.1:{port}", folder=folder)
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        assert process.poll() is None, f"the S3 server ended with {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
        else:
            return
