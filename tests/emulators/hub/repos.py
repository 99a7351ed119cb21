"""What the emulator serves: repositories with commits, made of files on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

# Files of at least this size, and some kinds always, are "large" on the hub: stored by their sha256.
LARGE_BYTES = 10_000_000
LARGE_KINDS = (".parquet", ".safetensors")


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_KINDS) or size >= LARGE_BYTES


@dataclasses.dataclass(frozen=True)
class ServedFile:
    """A file of a repository: its path there and where its bytes lie here."""

    path: str
    local: Path

    @property
    def size(self) -> int:
        return self.local.stat().st_size

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.local.read_bytes()).hexdigest()

    @property
    def git_oid(self) -> str:
        data = self.local.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def is_large(self) -> bool:
        return is_large(self.path, self.size)


class Repo:
    """A repository: commits (sha → files), of which ``main`` is the newest."""

    def __init__(self, name: str, files: list[ServedFile], *, private: bool = False) -> None:
        self.name = name
        self.private = private
        self.commits: dict[str, dict[str, ServedFile]] = {}
        self.main = self.commit({file.path: file for file in files})

    def commit(self, files: dict[str, ServedFile]) -> str:
        # The path of the local file stands for its content: reading everything at start is slow.
        listing = sorted(
            (file.path, str(file.local), file.local.stat().st_size, file.local.stat().st_mtime_ns)
            for file in files.values()
        )
        sha = hashlib.sha1(json.dumps([self.name, len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = files
        self.main = sha
        return sha

    def change(self, path: str, local: Path) -> str:
        """A new commit in which `path` is another file. The old commit stays."""
        return self.commit({**self.commits[self.main], path: ServedFile(path, local)})

    def resolve(self, revision: str) -> str | None:
        """The full sha of a branch or commit, or None."""
        if revision == "main":
            return self.main
        return revision if revision in self.commits else None


def folder_repo(name: str, folder: Path) -> Repo:
    """A repository with every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Repo(name, [ServedFile(path.relative_to(folder).as_posix(), path) for path in files])


def shared_repos(data: Path) -> list[Repo]:
    """The repositories that the project uses, from the shared test data."""
    shards = sorted((data / "pretrain_text").glob("shard_*.parquet"))
    training, validation = shards[:-1], shards[-1]
    # Eight training shards, as many as d4 wants: the first ones are served twice.
    served = [ServedFile(f"shard_{i:05d}.parquet", training[i % len(training)]) for i in range(8)]
    return [
        Repo(
            "karpathy/fineweb-edu-100b-shuffle",
            [*served, ServedFile("shard_01822.parquet", validation)],
        ),
        Repo("karpathy/climbmix-400b-shuffle", [*served, ServedFile("shard_06542.parquet", validation)]),
        *(_task_repo(folder) for folder in sorted((data / "task_data").iterdir()) if folder.is_dir()),
    ]


def _task_repo(folder: Path) -> Repo:
    """``<owner>--<name>/<config>/<split>/00000.parquet`` as the hub lays it out."""
    files = []
    for manifest in sorted(folder.glob("*/*/manifest.json")):
        split = manifest.parent
        names = json.loads(manifest.read_text())
        config = "data" if split.parent.name == "default" else split.parent.name
        for index, name in enumerate(names):
            path = f"{config}/{split.name}-{index:05d}-of-{len(names):05d}.parquet"
            files.append(ServedFile(path, split / name))
    return Repo(folder.name.replace("--", "/", 1), files)
