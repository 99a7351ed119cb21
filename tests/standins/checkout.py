"""A folder that looks like a checkout of its own: commands run in it leave the real one alone.

Dagster's commands give the `.env` of their project precedence over the shell, so a test that ran
them in the repository would write into the history of whoever runs the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def make_checkout(folder: Path) -> dict[str, str]:
    """Fill `folder`; returns what the environment must say for commands that run in it."""
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    for name in ("src", "docs", "scripts"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".dagster").mkdir()
    shutil.copy(REPOSITORY / "src/dagster_nanochat/instance.yaml", folder / ".dagster/dagster.yaml")
    (folder / ".env").write_text(f"DAGSTER_HOME={folder}/.dagster\n")
    return {
        "DAGSTER_HOME": f"{folder}/.dagster",
        "NANOCHAT_STORE": f"{folder}/data/store",
        "NANOCHAT_THREADS": "1",
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
    }


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End a server that has a session of its own, and what it started: politely first."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
