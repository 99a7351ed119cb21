"""A tiny model that goes through the whole graph in seconds, on text of the standard library."""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from standins.runs import Run
from standins.waiting import wait_for

TINY_RECIPE = r"""
import dataclasses
from nanochat.recipes import (
    Base, Data, Hardware, Ingredient, Midtrain, Model, Recipe, Sft, Tokenizer, gpt4_pattern,
)

def _mixture(rows):
    return tuple(
        Ingredient(task=task, rows=rows)
        for task in ("identity_small", "simple_spelling_small", "arithmetic", "offline_mmlu")
    )

TINY = Recipe(
    name="tiny",
    description="2 layers, 32 wide: goes through the whole graph in seconds",
    data=Data(source="tinytext", shards=2),
    tokenizer=Tokenizer(vocab_size=400, shards=2, pattern=gpt4_pattern(r"\p{N}")),
    model=Model(depth=2, width=32, heads=2, kv_heads=2, context=64),
    base=Base(
        steps=12, batch_tokens=4 * 64, eval_every=6, eval_tokens=2048, checkpoint_every=6,
        sample_prompts=("The",), ngram_baselines=True,
    ),
    midtrain=Midtrain(mixture=_mixture(40), batch_tokens=4 * 64, steps=6, eval_every=3, checkpoint_every=3),
    sft=Sft(
        mixture=_mixture(20), batch_rows=4, max_tokens=64, steps=4, eval_every=2, checkpoint_every=2,
        mmlu_task="offline_mmlu", arc_easy_task="offline_arc_easy", eval_questions=20,
    ),
    hardware=Hardware(device_batch_rows=4, min_gpu_memory_gib=1),
)
TWIN = dataclasses.replace(TINY, name="twin", midtrain=None, sft=None)
LONG = dataclasses.replace(TINY.base, steps=300_000, eval_every=1000, checkpoint_every=1000)
SLOW = dataclasses.replace(TWIN, name="slow", base=LONG)
KILLED = dataclasses.replace(
    TWIN, name="killed",
    base=dataclasses.replace(
        TINY.base, steps=1000, eval_every=250, checkpoint_every=50, ngram_baselines=False
    ),
)
# As long as SLOW for a test, and too little work to be compiled first.
STEADY = dataclasses.replace(
    KILLED, name="steady", base=dataclasses.replace(KILLED.base, steps=100_000, eval_every=10_000)
)
LOST = dataclasses.replace(
    KILLED, name="lost",
    base=dataclasses.replace(KILLED.base, steps=200, eval_every=200, checkpoint_every=40, eval_tokens=512),
)
RECIPES = [TINY, TWIN, SLOW, KILLED, STEADY, LOST]
"""

FOLDER = Path(tempfile.mkdtemp(prefix="nanochat-tests-"))
TEXT = FOLDER / "text"
ENVIRONMENT = {
    "NANOCHAT_RECIPES": str(FOLDER / "recipes.py"),
    "NANOCHAT_SOURCES": f"folder:tinytext={TEXT}",
    "NANOCHAT_THREADS": "1",
}


def write_text(folder: Path) -> None:
    """Three shards in the layout of the offline source: docstrings of a part of the standard library."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in sorted(Path(os.__file__).parent.glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                name = getattr(node, "name", "")
                row = {"source": "python", "module": path.stem, "name": name, "kind": "docstring", "part": 0}
                rows.append({"text": text, **row})
    third = len(rows) // 3
    for shard in range(3):
        table = pa.Table.from_pylist(rows[shard * third : (shard + 1) * third])
        pq.write_table(table, folder / f"part_{shard}.parquet", row_group_size=64)


# The partitions are made when the package is imported: the recipe and its source must be known then.
(FOLDER / "recipes.py").write_text(TINY_RECIPE, encoding="utf-8")
write_text(TEXT)
_before = {name: os.environ.get(name) for name in ENVIRONMENT}
os.environ.update(ENVIRONMENT)
try:
    import dagster_nanochat.partitions  # noqa: F401
finally:
    for _name, _value in _before.items():
        if _value is None:
            os.environ.pop(_name)
        else:
            os.environ[_name] = _value


@pytest.fixture(autouse=True)
def tiny_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here knows the tiny recipe and its source."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def module_environment() -> Iterator[pytest.MonkeyPatch]:
    """The same for fixtures of a module's scope."""
    patch = pytest.MonkeyPatch()
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    yield patch
    patch.undo()


@pytest.fixture
def run(project: SimpleNamespace) -> Iterator[Callable[..., Run]]:
    """run(model, asset, tags=…, in_process=…, config…): started at once, ended with the test."""
    started: list[Run] = []

    def start(
        model: str,
        asset: str = "base_model_checkpoint",
        *,
        tags: dict[str, str] | None = None,
        in_process: bool = False,
        watch_grace_s: float = 120.0,
        **config: Any,
    ) -> Run:
        tags = {"dagster/partition": model, **(tags or {})}
        one = Run(
            project.instance,
            in_process=in_process,
            watch_grace_s=watch_grace_s,
            asset=asset,
            tags=tags,
            config=config,
        )
        started.append(one)
        return one

    yield start
    for one in started:
        # Again and again: one in a process of its own may not have told Dagster of itself yet.
        wait_for(lambda one=one: one.cancel() or not one.running, within_s=60)
