"""A store in a folder.

Puts are a temporary file in the same folder, flushed to disk, then a rename. Conditional puts are
serialised by a lock on one file of the store, which the kernel releases when a process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from nanochat.store.digests import digest_bytes
from nanochat.store.objects import ObjectInfo, ObjectNotFound, PreconditionFailed, check_key, writing

_LOCK = ".lock"
_TEMPORARY = ".tmp-"


class FileStore:
    """Objects as files under `root`. An etag is a small object's digest, a large one's size and time."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    @property
    def url(self) -> str:
        return self.root.as_uri()

    def __repr__(self) -> str:
        return f"FileStore({str(self.root)!r})"

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFound(key, self.url) from error

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not path.is_file():
            return None
        return ObjectInfo(key=key, size=status.st_size, etag=_etag(path, status))

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        path = self._path(key)
        if if_match is None and not if_absent:
            self._write(path, data)
            return _etag_of_bytes(path, data)
        with self._locked():
            current = self.head(key)
            if if_absent and current is not None:
                raise PreconditionFailed(key, "it exists already")
            if if_match is not None and (current is None or current.etag != if_match):
                raise PreconditionFailed(key, "it has changed since it was read")
            self._write(path, data)
        return _etag_of_bytes(path, data)

    def put_file(self, key: str, path: Path, *, move: bool = False) -> None:
        target = self._path(key)
        with self._errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(target)
            try:
                if move:
                    shutil.move(path, temporary)
                else:
                    shutil.copyfile(path, temporary)
                _flush(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

    def fetch(self, key: str, destination: Path) -> Path:
        source = self._path(key)
        if not source.is_file():
            raise ObjectNotFound(key, self.url)
        with self._errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(destination)
            try:
                link_or_copy(source, temporary)
                os.replace(temporary, destination)
            except FileNotFoundError as error:
                raise ObjectNotFound(key, self.url) from error
            finally:
                temporary.unlink(missing_ok=True)
        return destination

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self.root / prefix[: prefix.rfind("/") + 1]
        found = []
        for directory, _, names in os.walk(folder):
            for name in names:
                if name.startswith(_TEMPORARY) or name == _LOCK:
                    continue
                key = (Path(directory) / name).relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    found.append(key)
        for key in sorted(found):
            info = self.head(key)
            if info is not None:
                yield info

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()

    def append(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                start, left = file.seek(0, os.SEEK_END), memoryview(data)
                try:
                    while left:  # an unbuffered write may take a part, and says so only by its result
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(start)  # the next line would be glued to the part
                    raise

    def read_appended(self, key: str, offset: int) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return b""

    def _write(self, path: Path, data: bytes) -> None:
        with self._errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary_beside(path)
            try:
                temporary.write_bytes(data)
                _flush(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / _LOCK).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield

    def _errors(self, path: Path) -> contextlib.AbstractContextManager[None]:
        return writing(path, f"store {self.root}")


_SMALL = 1 << 20


def _etag(path: Path, status: os.stat_result) -> str:
    if status.st_size <= _SMALL:
        return digest_bytes(path.read_bytes())[:32]
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _etag_of_bytes(path: Path, data: bytes) -> str:
    return digest_bytes(data)[:32] if len(data) <= _SMALL else _etag(path, path.stat())


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def link_or_copy(source: Path, destination: Path) -> None:
    """A hard link where the file system allows it, else a copy."""
    try:
        os.link(source, destination)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, destination)
