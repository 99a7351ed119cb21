"""The object store: keys to bytes, with atomic and conditional puts.

A reader never sees half an object. A conditional put is the only way two processes agree on
anything (receipts, leases); a store that cannot do it cannot hold them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What a store says of an object without reading it. `etag` changes when the content does."""

    key: str
    size: int
    etag: str


class StoreError(Exception):
    """The store could not do what was asked; the message says what, where, and the next step."""


class ObjectNotFound(StoreError):
    """There is no object under that key."""

    def __init__(self, key: str, store: str) -> None:
        super().__init__(f"no object {key!r} in store {store}")
        self.key = key


class PreconditionFailed(StoreError):
    """A conditional put lost: somebody else wrote first. Read again and decide again."""

    def __init__(self, key: str, condition: str) -> None:
        super().__init__(f"conditional put of {key!r} refused: {condition}")
        self.key = key


@contextlib.contextmanager
def writing(path: Path, owner: str) -> Iterator[None]:
    """What the file system refuses while `path` is written becomes a StoreError with the next step.

    owner: whose file it is, for the message.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{owner}: cannot write {path}: {error.strerror or error}. Check that the folder is writable and "
            "the disk is not full, or point NANOCHAT_STORE at another place."
        ) from error


class ObjectStore(Protocol):
    """Where everything that outlives a process is kept."""

    @property
    def url(self) -> str: ...

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises ObjectNotFound."""
        ...

    def head(self, key: str) -> ObjectInfo | None: ...

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Write atomically, return the new etag.

        if_match: only if the current etag is this one. if_absent: only if there is no object.
        Raises PreconditionFailed.
        """
        ...

    def put_file(self, key: str, path: Path, *, move: bool = False) -> None:
        """Write a file's content atomically. `move`: the caller gives the file up."""
        ...

    def fetch(self, key: str, destination: Path) -> Path:
        """Bring the object to a local path (replaced atomically). Raises ObjectNotFound."""
        ...

    def local_path(self, key: str) -> Path | None:
        """A path where the object can be read in place, or None where the store is not local."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; absent is fine."""
        ...

    def append(self, key: str, data: bytes) -> None:
        """Add whole lines to an object that one writer owns, creating it."""
        ...

    def read_appended(self, key: str, offset: int) -> bytes:
        """What has been appended to the object from byte `offset` on; nothing where there is none."""
        ...


def check_key(key: str) -> str:
    """The key itself. Raises ValueError where it could leave the store (`..`, absolute, empty part)."""
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"not a store key: {key!r} (relative, with no empty, '.' or '..' part)")
    return key
