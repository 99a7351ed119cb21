"""Where files gather before they are put into a store, who works there, and when to stop."""

from __future__ import annotations

import contextlib
import fcntl
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from nanochat.store import ObjectStore
from nanochat.store.objects import writing

_POLL_S = 0.1


class Stopped(Exception):
    """Work was given up because nobody waits for it any more."""


class Stop:
    """Tells the threads of one piece of work to give up, at the next point where they ask."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Stopped at once where the work is to stop."""
        if self._event.wait(seconds):
            raise Stopped


def staging_folder(store: ObjectStore, name: str) -> Path:
    """A folder for `name`, made: in the store's own folder where it has one, so that putting is a
    rename and the next run finds a broken download again. Raises StoreError."""
    local = store.local_path(f"staging/{name}")
    folder = local or Path(tempfile.gettempdir(), "nanochat-staging", re.sub(r"\W+", "-", store.url), name)
    with writing(folder, f"store {store.url}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def alone(store: ObjectStore, lock: Path, stop: Stop | None = None) -> Iterator[None]:
    """Held by one thread of one process at a time; the kernel lets go when a process dies.

    Raises StoreError where the lock cannot be made, Stopped while waiting for it.
    """
    stop = stop or Stop()
    with contextlib.ExitStack() as held:
        with writing(lock, f"store {store.url}"):
            file = held.enter_context(lock.open("a"))
        while True:
            stop.pause(0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop.pause(_POLL_S)
        yield
