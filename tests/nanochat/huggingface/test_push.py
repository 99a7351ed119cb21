"""Pushing with the hub's own client against the emulator."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulators.hub.client import HubEmulator, running_hub
from huggingface_hub import HfApi, snapshot_download

from nanochat.huggingface.config import ExportError
from nanochat.huggingface.export import CARD, RECORD, read_export
from nanochat.huggingface.push import push_export
from nanochat.huggingface.tokenizer import CHAT_TEMPLATE
from nanochat.store.digests import digest_file

TOKEN = "hf_of_me"


@pytest.fixture(scope="module")
def running() -> Iterator[HubEmulator]:
    with running_hub(token=TOKEN) as hub:
        yield hub


@pytest.fixture
def hub(running: HubEmulator, monkeypatch: pytest.MonkeyPatch) -> HubEmulator:
    """Without faults, and my token in the environment. Each test takes repositories of its own."""
    running.forget()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return running


@pytest.fixture
def api(hub: HubEmulator) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


def content(folder: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in folder.iterdir() if path.is_file()}


def pulled(api: HfApi, repo: str, to: Path) -> dict[str, str]:
    snapshot_download(repo, endpoint=api.endpoint, token=TOKEN, local_dir=to)
    return content(to)


def test_a_pushed_export_comes_back_as_it_was_and_is_private(
    exported: Path, api: HfApi, tmp_path: Path
) -> None:
    pushed = push_export(exported, "me/quick")
    assert (pushed.url, pushed.private) == (f"{api.endpoint}/me/quick", True)
    info = api.model_info("me/quick")
    assert (info.private, info.sha) == (True, pushed.commit)
    assert pulled(api, "me/quick", tmp_path / "pulled") == content(exported)
    assert read_export(tmp_path / "pulled") == read_export(exported)


def test_the_weights_go_to_the_storage_without_the_token(exported: Path, hub: HubEmulator) -> None:
    push_export(exported, "me/weights")
    stored = [request for request in hub.requests() if request["path"].startswith("/storage/")]
    # Another test may have stored the same weights: then nothing is sent.
    assert [request["authorization"] for request in stored] == [None] * len(stored)
    writes = [request for request in hub.requests() if request["path"] == "/api/repos/create"]
    assert [request["authorization"] for request in writes] == [f"Bearer {TOKEN}"]


def test_it_is_public_only_if_one_says_so(exported: Path, api: HfApi) -> None:
    assert push_export(exported, "me/open", public=True).private is False
    assert api.model_info("me/open").private is False
    before = api.model_info("me/open").sha
    with pytest.raises(ExportError, match="is there already and is public: push with --public"):
        push_export(exported, "me/open")
    assert api.model_info("me/open").sha == before
    push_export(exported, "me/closed")
    assert push_export(exported, "me/closed", public=True).private is True


def test_a_second_push_replaces_what_is_there_and_keeps_what_is_not_ours(
    exported: Path, api: HfApi, tmp_path: Path
) -> None:
    push_export(exported, "me/twice")
    api.upload_file(path_or_fileobj=b"kept", path_in_repo="notes.txt", repo_id="me/twice")
    folder = tmp_path / "base"
    shutil.copytree(exported, folder)
    record = read_export(folder)
    # As of a base model: without a chat template.
    (folder / CHAT_TEMPLATE).unlink()
    files = tuple(file for file in record.files if file.name != CHAT_TEMPLATE)
    (folder / RECORD).write_bytes(record.model_copy(update={"files": files}).to_bytes())
    (folder / CARD).write_text("---\nlibrary_name: transformers\n---\n\nmy own words\n")
    (folder / "draft.txt").write_text("not part of the export")
    push_export(folder, "me/twice")
    there = pulled(api, "me/twice", tmp_path / "pulled")
    assert set(there) == {*(file.name for file in files), CARD, RECORD, "notes.txt"}
    assert "my own words" in (tmp_path / "pulled" / CARD).read_text()


def test_a_folder_that_is_no_finished_export_is_not_pushed(
    exported: Path, hub: HubEmulator, tmp_path: Path
) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ExportError, match=r"model\.safetensors is not what was exported"):
        push_export(folder, "me/torn")
    (folder / RECORD).unlink()
    with pytest.raises(ExportError, match="no finished export"):
        push_export(folder, "me/torn")
    assert hub.requests() == []


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_who_may_not_write_is_told_so(
    exported: Path, hub: HubEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ExportError, match="Set HF_TOKEN to a token that may write to it") as raised:
        push_export(exported, "me/refused")
    assert hub.url in str(raised.value)
    assert "hf_of" not in str(raised.value)


def test_a_name_of_somebody_else_is_refused_in_words(exported: Path, hub: HubEmulator) -> None:
    hub.fault("POST /api/repos/create", "status", status=403)
    with pytest.raises(ExportError, match=r"refuses HF_TOKEN \(403\)"):
        push_export(exported, "they/quick")


@pytest.mark.parametrize("repo", ["me/a/b", "me/..", "me/with space"])
def test_a_name_that_is_none_is_refused(exported: Path, hub: HubEmulator, repo: str) -> None:
    with pytest.raises(ExportError, match="is no name of a repository: write owner/name"):
        push_export(exported, repo)
    assert hub.requests() == []


def test_a_failed_upload_commits_nothing(
    exported: Path, hub: HubEmulator, api: HfApi, tmp_path: Path
) -> None:
    push_export(exported, "me/fails")
    before = api.model_info("me/fails").sha
    folder = tmp_path / "other"
    shutil.copytree(exported, folder)
    (folder / "model.safetensors").write_bytes(b"other weights")
    record = read_export(exported)
    files = tuple(
        file.model_copy(
            update={"sha256": digest_file(folder / file.name), "size_bytes": len(b"other weights")}
        )
        if file.name == "model.safetensors"
        else file
        for file in record.files
    )
    (folder / RECORD).write_bytes(record.model_copy(update={"files": files}).to_bytes())
    hub.fault("PUT /storage/", "status", status=403)
    with pytest.raises(ExportError, match="me/fails was not pushed"):
        push_export(folder, "me/fails")
    assert api.model_info("me/fails").sha == before
    assert push_export(folder, "me/fails").commit != before


def test_a_hub_that_is_away_is_told_so(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"http://127\.0\.0\.1:9 cannot be reached .*push it again"):
        push_export(exported, "me/away")


def test_a_card_with_metadata_that_the_hub_refuses_is_not_pushed(
    exported: Path, hub: HubEmulator, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(exported, folder)
    (folder / CARD).write_text("---\n: [\n---\n")
    with pytest.raises(ExportError, match=r"README\.md"):
        push_export(folder, "me/broken")
    assert not any(request["path"].startswith("/api/models/me/broken/commit") for request in hub.requests())
