"""The folders that people expect in the project: views of what the store holds.

Hard links where the file system allows it, else copies. Nothing reads them back; delete them and
they are made again. What people put there themselves is left alone.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from nanochat.store import ObjectStore, project_root
from nanochat.store.files import link_or_copy
from nanochat.store.local import local_copy
from nanochat.store.receipts import FileRef, Receipt

_STAGE_FOLDERS = {"base": "checkpoints", "midtrain": "mid_checkpoints", "sft": "sft_checkpoints"}
# In a folder of views: the names of the files that were put there.
_SHOWN = ".nanochat-shown.json"


def project_folder(store: ObjectStore) -> Path:
    """Of a store that is a project's own ``data/store``, that project; else this one.

    A store elsewhere says nothing about the folders around it, so they are not written to.
    """
    path = store.local_path("x")
    if path is not None and path.parts[-3:-1] == ("data", "store"):
        return path.parents[2]
    return project_root()


def data_folder(store: ObjectStore) -> Path:
    """The project's ``data/``."""
    return project_folder(store) / "data"


def show_file(store: ObjectStore, file: FileRef, destination: Path) -> None:
    """Put one stored file at `destination`, replacing what is there in one step."""
    path = local_copy(store, file)
    if destination.exists() and os.path.samefile(path, destination):
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{uuid.uuid4().hex[:12]}-{destination.name}")
    link_or_copy(path, temporary)
    os.replace(temporary, destination)


def show_files(store: ObjectStore, files: tuple[FileRef, ...], folder: Path) -> Path:
    """Make `folder` hold these files, and none that was shown there before."""
    listing = folder / _SHOWN
    names = [file.name for file in files]
    for name in _shown_before(listing):
        if name not in names and (folder / name).is_file():
            (folder / name).unlink()
    for file in files:
        show_file(store, file, folder / file.name)
    listing.write_text(json.dumps(names) + "\n", encoding="utf-8")
    return folder


def _shown_before(listing: Path) -> list[str]:
    try:
        names = json.loads(listing.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    if not isinstance(names, list):
        return []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def show_checkpoint(store: ObjectStore, receipt: Receipt, model: str) -> Path:
    """``data/checkpoints/<model>/`` and its siblings of the later stages."""
    return show_files(store, receipt.outputs, data_folder(store) / _STAGE_FOLDERS[receipt.stage] / model)
