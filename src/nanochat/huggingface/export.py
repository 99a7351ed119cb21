"""A stage of a model as a folder that `transformers` loads.

The folder appears under its name only when everything in it has been compared with the model (see
`compare`); until then it is a hidden one beside it, and where anything fails that is removed. Its last
file, `nanochat.json`, says what it was made from, with the digest of every other file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nanochat.huggingface.config import ExportError, generation_config, model_config
from nanochat.recipe_book import load_recipes
from nanochat.store import ObjectStore
from nanochat.store.digests import digest_file
from nanochat.store.documents import Document
from nanochat.store.receipts import FileEntry, current_receipt

if TYPE_CHECKING:
    from nanochat.inference.chat import Source

RECORD = "nanochat.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"


class ExportRecord(Document):
    """`nanochat.json`: what an export is. `compared` counts what was found equal; see `Compared`.

    files: all but this one and the card, which people may edit.
    """

    schema_name: ClassVar[str] = "nanochat.huggingface_export"

    model: str
    stage: str
    fingerprint: str
    receipt_sha256: str
    transformers: str
    compared: dict[str, int]
    files: tuple[FileEntry, ...]

    def summary(self) -> str:
        """What was compared, in a sentence."""
        return (
            f"{self.model}, stage {self.stage}, equal in transformers {self.transformers}: the ids of "
            f"{self.compared['texts']} texts, the logits of {self.compared['logits']} prompts, "
            f"{self.compared['generated_tokens']} generated tokens"
        )


def export_model(store: ObjectStore, model: str, source: Source, destination: Path) -> ExportRecord:
    """Make `destination` the export of a model's current stage; an earlier export there is replaced.

    Raises ExportError (a model that cannot be expressed or differs once exported, a folder with other
    things in it, no transformers), ChatError where the stage is not built, CheckpointError, OSError.
    """
    from nanochat.inference.chat import STAGE_OF, load_engine

    _require_replaceable(destination)
    before = current_receipt(store, model, STAGE_OF[source])
    engine = load_engine(store, model, source, device="cpu", as_trained=True)
    if before is None or current_receipt(store, model, STAGE_OF[source]) != before:
        raise ExportError(f"{STAGE_OF[source]} of {model} was rebuilt just now: export it again")
    try:
        recipe = load_recipes()[model]
    except KeyError as error:  # built by somebody whose recipes these are not
        raise ExportError(str(error.args[0])) from error
    chat = source != "base"
    config = model_config(engine.model.config, engine.tokenizer, chat=chat)

    # Below, so that what cannot be exported is told before anything is loaded that takes seconds.
    from safetensors.torch import save_file

    from nanochat.huggingface.card import lineage, model_card
    from nanochat.huggingface.compare import compare, require_transformers
    from nanochat.huggingface.tokenizer import write_tokenizer
    from nanochat.huggingface.weights import converted

    transformers = require_transformers()
    with _unfinished(destination) as folder:
        tensors = converted(engine.model.state_dict(), engine.tokenizer.vocab_size)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)  # written for this user alone
        del tensors
        for name, document in (
            ("config.json", {**config, "transformers_version": transformers.__version__}),
            ("generation_config.json", generation_config(engine.tokenizer)),
        ):
            (folder / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        write_tokenizer(engine.tokenizer, folder, context=engine.context, chat=chat)
        compared = compare(folder, engine, chat=chat)
        files = tuple(FileEntry.of(path) for path in sorted(folder.iterdir()))
        built, vocab_size = engine.model.config, engine.tokenizer.vocab_size
        card = model_card(recipe, built, vocab_size, lineage(store, before), chat=chat)
        (folder / CARD).write_text(card, encoding="utf-8")
        counted = dataclasses.asdict(compared)
        record = ExportRecord(
            model=model,
            stage=before.stage,
            fingerprint=before.fingerprint,
            receipt_sha256=before.digest(),
            transformers=counted.pop("transformers"),
            compared=counted,
            files=files,
        )
        (folder / RECORD).write_bytes(record.to_bytes())
    return record


def read_export(folder: Path) -> ExportRecord:
    """The record of a finished export whose files are all as they were. Raises ExportError, DocumentError."""
    try:
        record = ExportRecord.from_bytes((folder / RECORD).read_bytes(), str(folder / RECORD))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ExportError(
            f"{folder} is no finished export (it has no {RECORD}): `nanochat export --out {folder}` makes one"
        ) from error
    for file in record.files:
        path = folder / file.name
        if not path.is_file() or digest_file(path) != file.sha256:
            raise ExportError(f"{path} is not what was exported: export {record.model} anew")
    return record


def _require_replaceable(destination: Path) -> None:
    if not destination.exists() or (destination / RECORD).is_file():
        return
    if not destination.is_dir() or any(destination.iterdir()):
        raise ExportError(
            f"{destination} is there already and is no earlier export: name another folder, or move it away"
        )


@contextlib.contextmanager
def _unfinished(destination: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` if nothing is raised, and else is removed."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    name = f".{destination.name}.{uuid.uuid4().hex[:12]}"
    folder, replaced = destination.with_name(f"{name}.new"), destination.with_name(f"{name}.old")
    folder.mkdir()
    try:
        yield folder
        if destination.exists():
            os.replace(destination, replaced)
        os.replace(folder, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
