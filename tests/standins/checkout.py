"""A folder that looks like a checkout of its own: commands run in it leave the real one alone.

Dagster's commands give the `.env` of their project precedence over the shell, so a test that ran
them in the repository would write into the history of whoever runs the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).parents[2]


def make_checkout(folder: Path) -> dict[str, str]:
    """Fill `folder`; returns what the environment must say for commands that run in it."""
    for name in ("pyproject.toml", "Makefile", "requirements.lock", "tools.lock"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("src", "docs", "scripts", "rustbpe"):
        (folder / name).symlink_to(REPOSITORY / name)
    # The set-up's own `.env`: what it writes must be what the commands can live with.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    subprocess.run(["make", "--silent", "environment"], cwd=folder, env=kept, check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    return {
        "DAGSTER_HOME": f"{folder}/.dagster",
        "NANOCHAT_STORE": f"{folder}/data/store",
        "NANOCHAT_THREADS": "1",
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
    }


@contextlib.contextmanager
def serve(root: Path, environment: dict[str, str], *command: str) -> Iterator[str]:
    """Run `dg dev`, or another command that serves Dagster's pages, in `root`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / command[0]),
                *command[1:],
                "--port",
                str(port),
                "--host",
                "127.0.0.1",
            ],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not _answers(f"{url}/server_info"):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.3)
        yield url
    finally:
        stop_server(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End a server that has a session of its own, and what it started: politely first."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
