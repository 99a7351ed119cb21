"""Programs that begin as forks of a process which has loaded what they need: they start in milliseconds.

    with forks.nursery("nanochat.pod") as nursery:
        process = nursery.fork("my.module:function", {"name": 1}, environment=…, folder=…)

`containers_of` gives the RunPod emulator containers of this kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
from emulators.runpod import container_init
from emulators.runpod.processes import Container, StartFailed

_NURSERY = "from standins import forks; forks.serve()"


class Fork:
    """A forked program, with as much of `subprocess.Popen` as is needed. returncode: 0 once it has ended,
    however it did."""

    def __init__(self, pid: int, stdin: int, stdout: int, alive: int) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "wb", buffering=0)
        self.stdout = os.fdopen(stdout, "rb")
        self.returncode: int | None = None
        self._alive = alive

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        # It alone has the other end of this pipe, and says nothing.
        while self.returncode is None:
            try:
                if os.read(self._alive, 1) == b"":
                    self.returncode = 0
            except BlockingIOError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise subprocess.TimeoutExpired("a fork", timeout or 0.0) from None
                time.sleep(0.002)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Nursery:
    """Safe to use from several threads."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _NURSERY, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def fork(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str] = os.environ,
        folder: Path | None = None,
    ) -> Fork:
        """Call ``module:function`` with JSON arguments in a process of its own."""
        asked = {
            "target": target,
            "arguments": dict(arguments),
            "environment": dict(environment),
            "folder": str(folder or Path.cwd()),
        }
        stdin, stdout, alive = os.pipe(), os.pipe(), os.pipe()
        os.set_blocking(alive[0], False)
        theirs = [stdin[0], stdout[1], alive[1]]
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps(asked).encode() + b"\n"], theirs)
                answer = self._socket.recv(100)
        finally:
            for end in theirs:
                os.close(end)
        assert answer, "the nursery has ended"
        return Fork(int(answer), stdin[1], stdout[0], alive[0])

    def close(self) -> None:
        self._socket.close()
        self._process.wait(timeout=10)


@contextlib.contextmanager
def nursery(*modules: str) -> Iterator[Nursery]:
    """A process that has imported `modules`. What it has forked by the end is not ended with it."""
    running = Nursery(modules)
    try:
        yield running
    finally:
        running.close()


def serve() -> None:
    """The nursery's own program."""
    asked = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # else the first collection of every fork copies all that it shares
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 20, 3)
        if not message:
            return
        while not message.endswith(b"\n"):
            message += asked.recv(1 << 20)
        pid = os.fork()
        if pid == 0:
            asked.close()
            _become(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(str(pid).encode())


def _become(asked: dict[str, Any], stdin: int, stdout: int, alive: int) -> NoReturn:
    os.set_inheritable(alive, False)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor, number in ((stdin, 0), (stdout, 1), (stdout, 2)):
        os.dup2(descriptor, number)
    os.close(stdin)
    os.close(stdout)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    tempfile.tempdir = None
    leave_with(functools.partial(_function(asked["target"]), **asked["arguments"]))


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def leave_with(work: Callable[[], Any]) -> NoReturn:
    """Do the work and end this process, which is a fork: nothing that its parent has set up is tidied."""
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


# -- containers ------------------------------------------------------------------------------------


def contain(command: list[str]) -> None:
    """What `emulators.runpod.container_init` does, for a command that is ``module:function``."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(container_init.PR_SET_CHILD_SUBREAPER, 1)
    target = _function(command[0])
    pid = os.fork()
    if pid == 0:
        os.setsid()
        # Of standard input, and of what tells that this container lives, only the init has the other end.
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.closerange(3, 256)
        leave_with(target)
    os.write(1, f"pid {pid}\n".encode())
    threading.Thread(target=container_init.end_with_emulator, daemon=True).start()
    ended, _ = os.wait()
    while ended != pid:
        ended, _ = os.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        container_init.kill_all()


class ForkedContainer(Container):
    """A container whose command is ``module:function``, in a fork."""

    def __init__(
        self,
        nursery: Nursery,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        on_line: Callable[[str], None],
        on_end: Callable[[Container], None],
    ) -> None:
        arguments = {"command": list(command)}
        self._init = nursery.fork(  # type: ignore[assignment]
            "standins.forks:contain", arguments, environment=environment, folder=folder
        )
        assert self._init.stdout is not None
        word, _, rest = self._init.stdout.readline().decode().strip().partition(" ")
        if word != "pid":
            self._end()
            raise StartFailed(f"the container ended: {word} {rest}")
        self.pid = int(rest)
        self._reader = threading.Thread(target=self._read, args=(on_line, on_end), daemon=True)
        self._reader.start()


def containers_of(nursery: Nursery) -> Callable[..., Container]:
    """In place of `emulators.runpod.pods.Container`."""
    return functools.partial(ForkedContainer, nursery)
