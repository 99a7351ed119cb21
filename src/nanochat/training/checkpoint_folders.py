"""Where a stage's checkpoints lie in the store, and which of them stay. Loads no torch: others clean up.

    <stage prefix>/checkpoints/<training>/step_<8 digits>/<file>

A training is named by the token of its first attempt; attempts that resume it write beside. So a
forced rebuild, which is a training of its own, touches no file of the receipt that it will replace.

While a training runs its newest two checkpoints stay. When its receipt is written, `drop_leftovers`
removes every checkpoint of the stage that no receipt names: what could be resumed of this training
and of those that never ended. The final checkpoint of every receipt stays, that of the replaced ones
too, so that each receipt under `receipts/` can be verified.
"""

from __future__ import annotations

import re

from nanochat.store import ObjectStore
from nanochat.store.receipts import Receipt

MANIFEST = "manifest.json"

_FILE = re.compile(r"(?P<prefix>.+/step_(?P<step>\d{8}))/[^/]+")


def training_prefix(stage_prefix: str, training: str) -> str:
    return f"{stage_prefix}/checkpoints/{training}"


def checkpoint_prefix(stage_prefix: str, training: str, step: int) -> str:
    return f"{training_prefix(stage_prefix, training)}/step_{step:08d}"


def list_checkpoints(store: ObjectStore, folder: str) -> list[str]:
    """Prefixes under `folder` that hold anything at all, complete or not, by ascending step."""
    matches = (_FILE.fullmatch(info.key) for info in store.list(f"{folder}/"))
    found = {(match["step"], match["prefix"]) for match in matches if match}
    return [prefix for _, prefix in sorted(found)]


def delete_checkpoint(store: ObjectStore, prefix: str) -> None:
    """The manifest goes first, so that what is left of an interrupted deletion counts as torn."""
    store.delete(f"{prefix}/{MANIFEST}")
    for info in list(store.list(f"{prefix}/")):
        store.delete(info.key)


def recorded_checkpoints(store: ObjectStore, stage_prefix: str) -> set[str]:
    """Prefixes of the checkpoints that a receipt of the stage names, the current one or an older.

    Raises DocumentError naming a receipt that cannot be read.
    """
    receipts = [Receipt.read(store, info.key) for info in store.list(f"{stage_prefix}/receipts/")]
    return {file.key.rpartition("/")[0] for receipt in receipts for file in receipt.outputs}


def drop_leftovers(store: ObjectStore, stage_prefix: str) -> list[str]:
    """Remove every checkpoint of the stage that no receipt names; their prefixes.

    For whoever holds the stage's lease, after its receipt was written. Raises DocumentError, with
    nothing removed, where a receipt cannot be read.
    """
    recorded = recorded_checkpoints(store, stage_prefix)
    leftovers = [p for p in list_checkpoints(store, f"{stage_prefix}/checkpoints") if p not in recorded]
    for prefix in leftovers:
        delete_checkpoint(store, prefix)
    return leftovers
