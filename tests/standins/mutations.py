"""Ways in which a stored file can be wrong, and everything that reads a model's files."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat.data.counts import ensure_counts
from nanochat.data.shards import require_shards, verified_shard_path
from nanochat.data.sources import get_source
from nanochat.inference.chat import load_chat
from nanochat.recipes import Recipe
from nanochat.stages import TRAINING_STAGES, resolve
from nanochat.store import FileStore, StoreError
from nanochat.store.receipts import current_receipt
from nanochat.training import checkpoint as ckpt
from nanochat.training.inputs import gather_inputs
from nanochat.training.job import TrainingJob

# What is mutated: its place in the store, and whose content it gets when two are swapped. `*` is one name.
ARTEFACTS = {
    "receipt": ("stages/sft/*/receipt.json", "stages/midtrain/*/receipt.json"),
    "identity": ("stages/sft/*/identity.json", "stages/midtrain/*/identity.json"),
    "pointer": ("models/tiny/sft.json", "models/tiny/midtrain.json"),
    "lease": ("stages/base/*/lease.json", "stages/base/*/plan.json"),
    "job": ("stages/sft/*/attempts/*/job.json", "stages/midtrain/*/attempts/*/job.json"),
    "tokenizer": ("stages/tokenizer/*/output/*/tokenizer.json", "stages/base/*/plan.json"),
    "weights": (
        "stages/sft/*/checkpoints/*/*/model.safetensors",
        "stages/midtrain/*/checkpoints/*/*/model.safetensors",
    ),
    "card": ("stages/sft/*/checkpoints/*/*/model.json", "stages/base/*/plan.json"),
    "optimizer": (
        "stages/sft/*/checkpoints/*/*/optimizer.safetensors",
        "stages/midtrain/*/checkpoints/*/*/optimizer.safetensors",
    ),
    "random": (
        "stages/sft/*/checkpoints/*/*/random.safetensors",
        "stages/sft/*/checkpoints/*/*/model.safetensors",
    ),
    "state": ("stages/sft/*/checkpoints/*/*/state.json", "stages/midtrain/*/checkpoints/*/*/state.json"),
    "manifest": (
        "stages/sft/*/checkpoints/*/*/manifest.json",
        "stages/midtrain/*/checkpoints/*/*/manifest.json",
    ),
    "conversations": (
        "stages/sft_data/*/output/*/train.jsonl",
        "stages/midtrain_data/*/output/*/train.jsonl",
    ),
    "shard": ("shards/tinytext/tinytext_part_0.parquet", "shards/tinytext/tinytext_part_1.parquet"),
    "shard record": ("shards/tinytext/tinytext_part_0.json", "shards/tinytext/tinytext_part_1.json"),
    "counts": ("counts/*/tinytext_part_0.counts", "counts/*/tinytext_part_1.counts"),
    "counts record": ("counts/*/tinytext_part_0.counts.json", "counts/*/tinytext_part_1.counts.json"),
}


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self._path), os.O_CREAT)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


def mutations(content: bytes, other: bytes, touched: Path) -> Iterator[tuple[str, bytes]]:
    """(what was done, content). Of what is not JSON only what is not about JSON."""
    yield "truncated", content[: len(content) // 2]
    yield "empty", b""
    yield "flipped", _flipped(content)
    yield "a pickle", pickle.dumps(_Touch(touched))
    yield "hostile JSON", b"[" * 200_000
    yield "swapped", other
    if content.startswith(b"{"):
        yield "of another kind", b'{"schema": "somebody.elses", "version": 1}'
        yield "newer", content.replace(b'"version": ', b'"version": 9')


def find(store: FileStore, pattern: str) -> Path:
    """The last file of that place: of checkpoints the final one."""
    return sorted(store.root.glob(pattern))[-1]


def copy_of(store: FileStore, folder: Path) -> FileStore:
    shutil.copytree(store.root, folder)
    return FileStore(folder)


def read_everything(store: FileStore, recipe: Recipe, work: Path) -> list[str]:
    """What those complain about who plan, chat, count, and resume. Other errors than ours are raised."""
    said: list[str] = []

    def attempt(read: Callable[[], object]) -> None:
        try:
            result = read()
        except (ValueError, StoreError) as error:
            said.append(str(error))
        else:
            said.extend(result if isinstance(result, list) else [])

    source = get_source(recipe.data.source)
    shards = source.training_shards()[: recipe.data.shards]
    attempt(lambda: [reason for state in resolve(recipe, store).values() for reason in state.reasons])
    attempt(lambda: load_chat(store, recipe.name))
    attempt(lambda: require_shards(store, source, shards) and None)
    for shard in shards:
        attempt(lambda shard=shard: verified_shard_path(store, source.name, shard))
        attempt(lambda shard=shard: ensure_counts(store, source.name, shard, recipe.tokenizer))
    for stage in TRAINING_STAGES:
        attempt(lambda stage=stage: current_receipt(store, recipe.name, stage))
        for key in [i.key for i in store.list(f"stages/{stage}/") if i.key.endswith("/job.json")]:
            attempt(lambda key=key: _start(store, key, work))
    return said


def _start(store: FileStore, key: str, work: Path) -> list[str]:
    """What an attempt does before its first step."""
    job = TrainingJob.read(store, key)
    shutil.rmtree(work, ignore_errors=True)
    gather_inputs(job, store, work, fetch=True)
    checkpoint, passed_over = ckpt.find_newest(store, job.prefix, work, lambda prefix, state: None)
    if checkpoint is not None:
        ckpt.load_tensors(ckpt.local_folder(work, checkpoint.prefix) / ckpt.OPTIMIZER)
    return passed_over
