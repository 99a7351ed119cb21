"""The store: objects, documents, receipts, fingerprints, leases."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlparse

from nanochat.store.files import FileStore
from nanochat.store.objects import ObjectInfo, ObjectNotFound, ObjectStore, PreconditionFailed, StoreError
from nanochat.store.s3 import S3Store

STORE_ENV = "NANOCHAT_STORE"

__all__ = [
    "STORE_ENV",
    "FileStore",
    "ObjectInfo",
    "ObjectNotFound",
    "ObjectStore",
    "PreconditionFailed",
    "S3Store",
    "StoreError",
    "open_store",
    "project_root",
]


def project_root() -> Path:
    """The folder of the checkout: where `pyproject.toml` and `data/` are.

    The package is installed from a checkout (editable); elsewhere it is the working folder.
    """
    checkout = Path(__file__).resolve().parents[3]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def open_store(url: str | None = None) -> ObjectStore:
    """The store at `url` (``file:///…`` or a path), else ``NANOCHAT_STORE``, else ``data/store``.

    Raises ValueError for a kind of store that this version does not have, and for a misspelt URL.
    """
    location = url or os.environ.get(STORE_ENV) or str(project_root() / "data" / "store")
    parsed = urlparse(location)
    if parsed.scheme == "file" and parsed.netloc not in ("", "localhost"):
        raise ValueError(
            f"NANOCHAT_STORE={location!r}: {parsed.netloc!r} would be the name of a machine. "
            f"Write file:///{parsed.netloc}{parsed.path} for an absolute path, "
            f"or {parsed.netloc}{parsed.path} for one from the working folder"
        )
    if parsed.scheme in ("", "file"):
        return FileStore(Path(unquote(parsed.path) if parsed.scheme else location))
    if parsed.scheme == "s3":
        if not parsed.netloc:
            raise ValueError(f"NANOCHAT_STORE={location!r} names no bucket: write s3://bucket/prefix")
        return S3Store(parsed.netloc, unquote(parsed.path))
    raise ValueError(
        f"NANOCHAT_STORE={location!r}: {parsed.scheme}:// is no store that is known; "
        "give a path, file:///… or s3://bucket/prefix"
    )
