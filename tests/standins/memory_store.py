"""A store in memory: what thousands of histories are told in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nanochat.store.digests import digest_bytes
from nanochat.store.objects import ObjectInfo, ObjectNotFound, PreconditionFailed, check_key


class MemoryStore:
    """Keys to bytes, with conditional puts."""

    url = "memory:"

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = dict(objects or {})

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectNotFound(key, self.url)
        return self.objects[key]

    def head(self, key: str) -> ObjectInfo | None:
        data = self.objects.get(check_key(key))
        return None if data is None else ObjectInfo(key=key, size=len(data), etag=digest_bytes(data))

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        current = self.head(key)
        if if_absent and current is not None:
            raise PreconditionFailed(key, "it exists already")
        if if_match is not None and (current is None or current.etag != if_match):
            raise PreconditionFailed(key, "it has changed since it was read")
        self.objects[key] = data
        return digest_bytes(data)

    def put_file(self, key: str, path: Path, *, move: bool = False) -> None:
        raise NotImplementedError("histories have no files")

    def fetch(self, key: str, destination: Path) -> Path:
        raise NotImplementedError("histories have no files")

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for key in sorted(self.objects):
            if key.startswith(prefix):
                info = self.head(key)
                assert info is not None
                yield info

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def append(self, key: str, data: bytes) -> None:
        self.objects[key] = self.objects.get(key, b"") + data

    def read_appended(self, key: str, offset: int) -> bytes:
        return self.objects.get(key, b"")[offset:]
