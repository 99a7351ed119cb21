"""Stored files as files of this machine: in place where the store is a folder, else a verified copy.

Copies are kept by content under ``NANOCHAT_CACHE`` (default ``~/.cache/nanochat``), so a file is
brought once, whatever asks for it and however often. Nothing depends on a copy: delete any at will.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from nanochat.store.digests import digest_file
from nanochat.store.objects import ObjectStore, StoreError
from nanochat.store.receipts import FileRef

CACHE_ENV = "NANOCHAT_CACHE"


def local_copy(store: ObjectStore, file: FileRef) -> Path:
    """Where the file can be read here. Not for writing: it may be the store's own.

    Raises ObjectNotFound, and StoreError where what the store gave is not what `file` says. A file
    that is read in place is not verified: only who is about to trust it needs to (`verify_file`).
    """
    in_place = store.local_path(file.key)
    if in_place is not None:
        return in_place
    copy = cached_path(file.sha256)
    if copy.exists():
        return copy
    arrived = store.fetch(file.key, copy.with_name(f"{file.sha256}.{uuid.uuid4().hex[:12]}"))
    size, found = arrived.stat().st_size, digest_file(arrived)
    if (size, found) != (file.size_bytes, file.sha256):
        arrived.unlink()
        raise StoreError(
            f"{file.key} of store {store.url} is damaged: recorded sha256 {file.sha256} ({file.size_bytes} "
            f"bytes), found {found} ({size} bytes)"
        )
    os.replace(arrived, copy)
    return copy


def cached_path(sha256: str) -> Path:
    """Where the copy of a content is, or would be."""
    return cache_folder() / sha256[:2] / sha256


def cache_folder() -> Path:
    """Where copies are kept."""
    named = os.environ.get(CACHE_ENV)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "nanochat"
