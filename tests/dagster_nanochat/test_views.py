"""Folders that people expect: in the project, and nothing of theirs is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.store import FileStore
from nanochat.store.digests import digest_bytes
from nanochat.store.receipts import FileRef


def put(store: FileStore, name: str, text: str) -> FileRef:
    data = text.encode()
    store.put(f"outputs/{text}/{name}", data)
    return FileRef(key=f"outputs/{text}/{name}", size_bytes=len(data), sha256=digest_bytes(data))


@pytest.mark.parametrize(
    ("store", "project"),
    [
        ("somewhere/data/store", "somewhere"),
        ("data/store", "."),
        ("nanochat", None),
        ("somewhere/store", None),
        ("data/store/inner", None),
    ],
)
def test_only_a_store_in_a_projects_data_folder_has_views_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, project: str | None
) -> None:
    from dagster_nanochat import views

    monkeypatch.setattr(views, "project_root", lambda: tmp_path / "checkout")
    expected = tmp_path / (project or "checkout")
    opened = FileStore(tmp_path / store)
    assert views.project_folder(opened) == expected
    assert views.data_folder(opened) == expected / "data"


def test_a_view_follows_the_store_and_leaves_what_people_put_there(tmp_path: Path) -> None:
    from dagster_nanochat.views import show_files

    store, folder = FileStore(tmp_path / "store"), tmp_path / "view"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "mine.bin").write_text("mine too")
    show_files(store, (put(store, "model", "one"), put(store, "optimizer", "one")), folder)
    assert (folder / "model").read_text() == "one"
    show_files(store, (put(store, "model", "two"),), folder)
    assert (folder / "model").read_text() == "two"
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "mine.bin",
        "model",
        "notes",
    ]
    assert (folder / "notes" / "mine.txt").read_text() == "mine"
    assert store.get("outputs/one/optimizer") == b"one"
