"""Containers as process trees of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

_INIT = Path(__file__).with_name("container_init.py")


class StartFailed(Exception):
    """The command cannot be executed."""


class Container:
    """A running command with all its descendants. `on_line` gets what it prints, `on_end` is called once
    everything has ended; both from a thread of the container's own. Raises StartFailed."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        on_line: Callable[[str], None],
        on_end: Callable[[Container], None],
    ) -> None:
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as status:
            try:
                self._init = subprocess.Popen(
                    [sys.executable, "-I", str(_INIT), str(writing), *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    cwd=folder,
                    pass_fds=[writing],
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            word, _, rest = status.readline().decode().strip().partition(" ")
        if word != "pid":
            self._end()
            raise StartFailed(rest or f"the container ended with {self._init.returncode}")
        self.pid = int(rest)
        self._reader = threading.Thread(target=self._read, args=(on_line, on_end), daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self._init.poll() is None

    def family(self) -> list[psutil.Process]:
        """The command and its descendants, as far as they still run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._init.pid).children(recursive=True)
        return []

    def terminate(self, *, grace_s: float) -> None:
        """SIGTERM to the command; after `grace_s` everything is killed. Returns when all has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._init.wait(timeout=grace_s)
        self.kill()

    def kill(self) -> None:
        self._end()
        self._reader.join(timeout=10)

    def freeze(self) -> None:
        """SIGSTOP to every process."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _end(self) -> None:
        assert self._init.stdin is not None
        with contextlib.suppress(OSError):
            self._init.stdin.close()
        self._init.wait(timeout=20)

    def _read(self, on_line: Callable[[str], None], on_end: Callable[[Container], None]) -> None:
        assert self._init.stdout is not None
        with self._init.stdout as output:
            for line in output:
                on_line(line.decode(errors="replace").rstrip("\n"))
        self._init.wait()
        on_end(self)
