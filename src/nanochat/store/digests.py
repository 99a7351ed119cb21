"""SHA-256 digests of files, bytes and JSON values: what an artefact is called by."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's content, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """One byte string per JSON value: sorted keys, no spaces, no NaN.

    Raises ValueError on NaN and infinities, TypeError on what is not JSON.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))
