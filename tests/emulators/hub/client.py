"""The emulator as a test holds it: a process with a URL, faults to order, a log to look at."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).resolve().parents[2]


class HubEmulator:
    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, trust_env=False)

    def fault(self, match: str, kind: str, **fields: Any) -> None:
        """Spoil the next request(s) whose ``METHOD /path`` matches; see `faults.Fault`."""
        self._client.post(
            "/_emulator/faults", json={"match": match, "kind": kind, **fields}
        ).raise_for_status()

    def requests(self) -> list[dict[str, Any]]:
        """Every request so far, oldest first."""
        return list(self._client.get("/_emulator/requests").json())

    def forget(self) -> None:
        """Clear faults and log."""
        self._client.delete("/_emulator/faults").raise_for_status()
        self._client.delete("/_emulator/requests").raise_for_status()

    def commit(self, repo: str, path: str, local: Path) -> str:
        """A new commit on main in which `path` is the file `local`; returns its sha."""
        answer = self._client.post(
            "/_emulator/commits", json={"repo": repo, "path": path, "local": str(local)}
        )
        return str(answer.raise_for_status().json()["sha"])


@contextlib.contextmanager
def running_hub(
    *,
    data: Path | None = None,
    repos: Mapping[str, Path] | None = None,
    token: str | None = None,
    page: int | None = None,
) -> Iterator[HubEmulator]:
    """A hub emulator in a process of its own, until the block ends."""
    command = [sys.executable, "-m", "emulators.hub"]
    if data:
        command += ["--data", str(data)]
    for name, folder in (repos or {}).items():
        command += ["--repo", f"{name}={folder}"]
    if token:
        command += ["--token", token]
    if page:
        command += ["--page", str(page)]
    with subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url.startswith("http"):
                raise RuntimeError(f"the hub emulator did not start: {url!r}")
            yield HubEmulator(url)
        finally:
            process.terminate()
