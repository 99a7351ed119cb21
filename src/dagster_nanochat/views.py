"""The folders that people expect beside the store: views of what the store holds.

Hard links where the file system allows it, else copies. Nothing reads them back; delete them and
they are made again.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from nanochat.store import ObjectStore, project_root
from nanochat.store.files import link_or_copy
from nanochat.store.receipts import FileRef, Receipt

_STAGE_FOLDERS = {"base": "checkpoints", "midtrain": "mid_checkpoints", "sft": "sft_checkpoints"}


def data_folder(store: ObjectStore) -> Path:
    """The folder beside a local store, else the project's ``data/``."""
    path = store.local_path("x")
    return path.parent.parent if path is not None else project_root() / "data"


def show_file(store: ObjectStore, file: FileRef, destination: Path) -> None:
    """Put one stored file at `destination`, replacing what is there in one step."""
    path = store.local_path(file.key)
    if path is None:
        store.fetch(file.key, destination)
        return
    if destination.exists() and os.path.samefile(path, destination):
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{uuid.uuid4().hex[:12]}-{destination.name}")
    link_or_copy(path, temporary)
    os.replace(temporary, destination)


def show_files(store: ObjectStore, files: tuple[FileRef, ...], folder: Path) -> Path:
    """Make `folder` hold exactly these files."""
    names = {file.name for file in files}
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for file in files:
        show_file(store, file, folder / file.name)
    return folder


def show_checkpoint(store: ObjectStore, receipt: Receipt, model: str) -> Path:
    """``data/checkpoints/<model>/`` and its siblings of the later stages."""
    return show_files(store, receipt.outputs, data_folder(store) / _STAGE_FOLDERS[receipt.stage] / model)
