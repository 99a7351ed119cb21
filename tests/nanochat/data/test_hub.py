from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulators.hub.client import HubEmulator, running_hub

from nanochat.data.hub import HubError, HubRepo, Patience
from nanochat.data.staging import Stop, Stopped
from nanochat.store.digests import digest_file

REPO = "someone/words"
SOON = Patience(attempts=3, first_pause_s=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two large files and a small one.

    The client writes what arrives in blocks of 10 MB: less than that cannot be continued.
    """
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "data").mkdir()
    (folder / "data" / "a.parquet").write_bytes(os.urandom(12_000_000))
    (folder / "data" / "b.parquet").write_bytes(os.urandom(1_000))
    (folder / "README.md").write_text("# words\n")
    return folder


@pytest.fixture(scope="module")
def _hub(folder: Path) -> Iterator[HubEmulator]:
    with running_hub(repos={REPO: folder}, page=2) as hub:
        yield hub


@pytest.fixture
def hub(_hub: HubEmulator) -> HubEmulator:
    _hub.forget()
    return _hub


@pytest.fixture
def repo(hub: HubEmulator) -> HubRepo:
    return HubRepo(REPO, endpoint=hub.url, patience=SOON)


def test_a_file_arrives_whole_and_nothing_is_left_beside_it(
    repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    revision = repo.newest_revision()
    repo.download("data/a.parquet", revision, tmp_path / "a.parquet")
    assert digest_file(tmp_path / "a.parquet") == digest_file(folder / "data" / "a.parquet")
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_the_listing_of_all_pages_has_size_and_sha256_of_large_files(repo: HubRepo, folder: Path) -> None:
    files = repo.files(repo.newest_revision())
    assert sorted(files) == ["README.md", "data/a.parquet", "data/b.parquet"]
    assert files["data/a.parquet"].sha256 == digest_file(folder / "data" / "a.parquet")
    assert files["data/a.parquet"].size_bytes == 12_000_000
    assert files["README.md"].sha256 is None


def test_a_broken_download_is_continued_from_where_it_broke(
    hub: HubEmulator, repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    hub.fault("GET /storage/", "cut", after=11_000_000)
    repo.download("data/a.parquet", repo.newest_revision(), tmp_path / "a.parquet")
    assert digest_file(tmp_path / "a.parquet") == digest_file(folder / "data" / "a.parquet")
    ranges = [request["range"] for request in hub.requests() if request["path"].startswith("/storage/")]
    assert ranges == [None, "bytes=10485760-"]


def test_a_transfer_that_is_to_stop_ends_in_the_middle(
    hub: HubEmulator, repo: HubRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.fault("GET /storage/", "slow", pause_s=0.1)  # 18 seconds for the whole file
    stop = Stop()
    threading.Timer(0.5, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        repo.download("data/a.parquet", repo.newest_revision(), tmp_path / "a.parquet", stop)
    assert time.monotonic() - start < 5
    assert not (tmp_path / "a.parquet").exists()


def test_a_download_that_was_given_up_is_continued_by_the_next_call_and_never_looks_finished(
    hub: HubEmulator, repo: HubRepo, folder: Path, tmp_path: Path
) -> None:
    hub.fault("GET /storage/", "cut", after=11_000_000)
    hub.fault("GET /storage/", "cut", after=1_000, times=2)
    revision = repo.newest_revision()
    with pytest.raises(HubError, match=r"failed 3 times.*run it again"):
        repo.download("data/a.parquet", revision, tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()
    hub.forget()
    repo.download("data/a.parquet", revision, tmp_path / "a.parquet")
    assert digest_file(tmp_path / "a.parquet") == digest_file(folder / "data" / "a.parquet")
    (request,) = [request for request in hub.requests() if request["path"].startswith("/storage/")]
    assert request["range"] == "bytes=10485760-"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_that_passes_is_waited_out(
    hub: HubEmulator, repo: HubRepo, status: int, tmp_path: Path
) -> None:
    hub.fault("/api/datasets/", "status", status=status)
    hub.fault("/storage/", "status", status=status)
    repo.download("data/b.parquet", repo.newest_revision(), tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").stat().st_size == 1_000


def test_a_missing_repository_file_and_revision_are_each_named(repo: HubRepo, hub: HubEmulator) -> None:
    with pytest.raises(HubError, match=r"someone/nothing.*Check the name"):
        HubRepo("someone/nothing", endpoint=hub.url, patience=SOON).newest_revision()
    with pytest.raises(HubError, match=r"no file data/c\.parquet"):
        repo.file("data/c.parquet", repo.newest_revision())
    with pytest.raises(HubError, match="no longer has that revision"):
        repo.files("0" * 40)


def test_a_hub_that_cannot_be_reached_says_what_to_check() -> None:
    with pytest.raises(HubError, match=r"HF_ENDPOINT.*offline"):
        HubRepo(REPO, endpoint="http://127.0.0.1:9", patience=SOON).newest_revision()


def test_a_private_repository_opens_with_the_token_which_storage_never_sees(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(repos={REPO: folder}, token="secret") as hub:
        repo = HubRepo(REPO, endpoint=hub.url, patience=SOON)
        with pytest.raises(HubError, match="HF_TOKEN"):
            repo.newest_revision()
        monkeypatch.setenv("HF_TOKEN", "secret")
        hub.forget()
        repo.download("data/b.parquet", repo.newest_revision(), tmp_path / "b.parquet")
        seen = {request["host"]: request["authorization"] for request in hub.requests()}
    assert seen == {"127.0.0.1": "Bearer secret", "localhost": None}


def test_the_endpoint_comes_from_the_environment(hub: HubEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    repo = HubRepo(REPO, patience=SOON)
    revision = repo.newest_revision()
    assert repo.url("data/a.parquet", revision) == (
        f"{hub.url}/datasets/{REPO}/resolve/{revision}/data/a.parquet"
    )
