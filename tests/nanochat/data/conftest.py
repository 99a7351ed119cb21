"""What the tests of conversations share: a small real corpus, and datasets in the hub's schemas."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.tasks import TaskContext
from nanochat.store.digests import digest_bytes

REPOSITORY = Path(__file__).parents[3]


class Row(NamedTuple):
    """A document in the shape of an offline shard's row."""

    text: str
    source: str
    module: str
    name: str
    kind: str = "docstring"
    part: int = 0


class LocalHub:
    """Datasets that lie in a folder as <owner>--<name>/<config>/<split>/*.parquet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, repo: str, config: str, split: str) -> list[Path]:
        return sorted((self.root / repo.replace("/", "--") / config / split).glob("*.parquet"))

    def digest(self, repo: str, config: str, split: str) -> str:
        return digest_bytes(b"".join(path.read_bytes() for path in self.files(repo, config, split)))


@pytest.fixture(scope="session")
def identity_file() -> Path:
    return REPOSITORY / "data" / "identity_conversations.jsonl"


@pytest.fixture(scope="session")
def documents() -> tuple[Row, ...]:
    """What the standard library's single-file modules document about themselves."""

    def read() -> Iterator[Row]:
        folder = Path(sysconfig.get_path("stdlib"))
        for path in sorted(folder.glob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        yield Row(text, "python", path.stem, getattr(node, "name", ""))

    return tuple(read())


@pytest.fixture(scope="session")
def context(documents: tuple[Row, ...], identity_file: Path) -> TaskContext:
    return TaskContext(
        offline_documents=lambda: documents, corpus_digest="stdlib", identity_path=identity_file
    )


@pytest.fixture
def make_hub(tmp_path: Path) -> Callable[[dict[str, list[dict[str, Any]]]], LocalHub]:
    """make_hub({"openai/gsm8k/main/train": [row, …]}) -> a hub with those rows, in two files each."""

    def make(splits: dict[str, list[dict[str, Any]]]) -> LocalHub:
        root = tmp_path / "hub"
        for name, rows in splits.items():
            repo, config, split = name.rsplit("/", 2)
            folder = root / repo.replace("/", "--") / config / split
            folder.mkdir(parents=True)
            table, middle = pa.Table.from_pylist(rows), len(rows) // 2
            pq.write_table(table.slice(0, middle), folder / "00000.parquet")
            pq.write_table(table.slice(middle), folder / "00001.parquet")
        return LocalHub(root)

    return make


@pytest.fixture
def real_hub(shared_data: Path) -> LocalHub:
    return LocalHub(shared_data / "task_data")
