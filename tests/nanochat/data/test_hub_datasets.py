from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emulators.hub.client import HubEmulator, running_hub

from nanochat.data.hub import HubError
from nanochat.data.hub_datasets import DatasetRecord, HubDatasets
from nanochat.store import FileStore
from nanochat.store.digests import digest_file

REPO = "someone/questions"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with a split in two files, and another config with a split of a similar name."""
    folder = tmp_path / "questions"
    for path, rows in {
        "main/train-00000-of-00002.parquet": ["a", "b"],
        "main/train-00001-of-00002.parquet": ["c"],
        "main/train_extra-00000-of-00001.parquet": ["x"],
        "other/test-00000-of-00001.parquet": ["z"],
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"question": rows}), folder / path)
    return folder


def questions(table: pa.Table) -> list[str]:
    return [str(value) for value in table.column("question").to_pylist()]


def rows(datasets: HubDatasets, store: FileStore, config: str, split: str, repo: str = REPO) -> pa.Table:
    files = [store.local_path(file.key) for file in datasets.files(repo, config, split)]
    return pa.concat_tables([pq.read_table(path) for path in files], promote_options="permissive")


def test_a_split_is_all_its_files_in_order_and_downloaded_once(folder: Path, tmp_store: FileStore) -> None:
    with running_hub(repos={REPO: folder}) as hub:
        datasets = HubDatasets(tmp_store, endpoint=hub.url)
        assert questions(rows(datasets, tmp_store, "main", "train")) == ["a", "b", "c"]
        assert questions(rows(datasets, tmp_store, "main", "train_extra")) == ["x"]
        hub.forget()
        again = HubDatasets(tmp_store, endpoint=hub.url)
        assert again.has(REPO, "main", "train")
        assert questions(rows(again, tmp_store, "main", "train")) == ["a", "b", "c"]
        assert hub.requests() == []


def test_a_split_of_which_a_part_has_arrived_is_not_there(folder: Path, tmp_store: FileStore) -> None:
    with running_hub(repos={REPO: folder}) as hub:
        datasets = HubDatasets(tmp_store, endpoint=hub.url)
        hub.fault("/resolve/.*/main/train-00001", "status", status=404)
        with pytest.raises(HubError):
            datasets.files(REPO, "main", "train")
        assert not datasets.has(REPO, "main", "train")
        hub.forget()
        assert questions(rows(datasets, tmp_store, "main", "train")) == ["a", "b", "c"]
        assert sum(request["path"].startswith("/storage/") for request in hub.requests()) <= 2


def test_revision_and_digests_are_recorded_and_kept_until_refreshed(
    folder: Path, tmp_store: FileStore, tmp_path: Path
) -> None:
    with running_hub(repos={REPO: folder}) as hub:
        datasets = HubDatasets(tmp_store, endpoint=hub.url)
        datasets.files(REPO, "main", "train")
        record = DatasetRecord.read(tmp_store, "datasets/someone--questions/dataset.json")
        path = "main/train-00001-of-00002.parquet"
        assert record.files[path].sha256 == digest_file(folder / path)
        changed = tmp_path / "changed.parquet"
        pq.write_table(pa.table({"question": ["d"]}), changed)
        newer = hub.commit(REPO, path, changed)
        assert questions(rows(datasets, tmp_store, "main", "train")) == ["a", "b", "c"]
        assert datasets.revision(REPO) == record.revision
        assert datasets.revision(REPO, refresh=True) == newer
        assert questions(rows(datasets, tmp_store, "main", "train")) == ["a", "b", "d"]


def test_a_damaged_file_is_fetched_once_more_then_refused_with_both_digests(
    folder: Path, tmp_store: FileStore
) -> None:
    with running_hub(repos={REPO: folder}) as hub:
        datasets = HubDatasets(tmp_store, endpoint=hub.url)
        hub.fault("GET /storage/", "wrong_bytes", after=40, times=2)
        with pytest.raises(
            HubError, match=r"test-00000-of-00001.parquet arrived damaged twice: expected sha256"
        ):
            datasets.files(REPO, "other", "test")
        hub.fault("GET /storage/", "wrong_bytes", after=40)
        assert questions(rows(datasets, tmp_store, "other", "test")) == ["z"]


def test_a_split_that_is_not_there_is_named_with_those_that_are(folder: Path, tmp_store: FileStore) -> None:
    with (
        running_hub(repos={REPO: folder}) as hub,
        pytest.raises(
            HubError, match=r"no parquet files of split 'test' of 'main'.*It has: main/train, main"
        ),
    ):
        HubDatasets(tmp_store, endpoint=hub.url).files(REPO, "main", "test")


@pytest.mark.needs_data
@pytest.mark.parametrize(
    ("repo", "config", "split", "count", "columns"),
    [
        ("HuggingFaceTB/smol-smoltalk", "default", "train", 10_897, {"messages", "source"}),
        ("allenai/ai2_arc", "ARC-Easy", "train", 2_251, {"id", "question", "choices", "answerKey"}),
        ("allenai/ai2_arc", "ARC-Challenge", "test", 1_172, {"id", "question", "choices", "answerKey"}),
        ("openai/gsm8k", "main", "train", 7_473, {"question", "answer"}),
        ("cais/mmlu", "all", "auxiliary_train", 8_315, {"question", "subject", "choices", "answer"}),
        ("cais/mmlu", "all", "test", 14_042, {"question", "subject", "choices", "answer"}),
    ],
)
def test_the_datasets_of_the_tasks_are_read_as_the_hub_lays_them_out(
    shared_hub: HubEmulator,
    tmp_store: FileStore,
    repo: str,
    config: str,
    split: str,
    count: int,
    columns: set[str],
) -> None:
    table = rows(HubDatasets(tmp_store), tmp_store, config, split, repo)
    assert table.num_rows == count
    assert set(table.column_names) == columns
