"""Where files gather before they are put into a store, and who works there."""

from __future__ import annotations

import contextlib
import fcntl
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanochat.store import ObjectStore


def staging_folder(store: ObjectStore, name: str) -> Path:
    """A folder for `name`, made: in the store's own folder where it has one, so that putting is a
    rename and the next run finds a broken download again."""
    local = store.local_path(f"staging/{name}")
    folder = local or Path(tempfile.gettempdir(), "nanochat-staging", re.sub(r"\W+", "-", store.url), name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Held by one thread of one process at a time; the kernel lets go when a process dies."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
