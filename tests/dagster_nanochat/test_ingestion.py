"""Ingestion through Dagster: what is shown, what is counted, and what one failure leaves of the rest."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emulators.hub.client import running_hub

from nanochat.data.shards import ingest_shards, read_record
from nanochat.data.sources import get_source
from nanochat.store import FileStore

Ingest = Callable[..., "Run"]


class Run(NamedTuple):
    """What a run left in Dagster's history: materialized (asset, partition), and why it failed."""

    made: set[tuple[str, str | None]]
    failure: str | None


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("NANOCHAT_STORE", str(tmp_path / "data" / "store"))
    return FileStore(tmp_path / "data" / "store")


@pytest.fixture
def ingest(store: FileStore) -> Iterator[Ingest]:
    """ingest(first, last, **config) runs the job over a range of shards, in a history of its own."""
    with dg.instance_for_test() as instance:
        yield functools.partial(run_ingestion, instance)


def run_ingestion(
    instance: dg.DagsterInstance,
    first: str = "tinytext_part_0",
    last: str = "tinytext_part_1",
    **config: object,
) -> Run:
    from dagster_nanochat.definitions import defs

    result = (
        defs()
        .resolve_job_def("ingest_shards")
        .execute_in_process(
            instance=instance,
            tags={"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last},
            run_config={"ops": {"ingested_shards": {"config": config}}},
            raise_on_error=False,
        )
    )
    events = [entry.dagster_event for entry in instance.all_logs(result.run_id) if entry.dagster_event]
    made = {
        (event.asset_key.to_user_string(), event.partition)
        for event in events
        if event.is_step_materialization and event.asset_key
    }
    reasons = [
        event.step_failure_data.user_failure_data.description
        for event in events
        if event.is_step_failure and event.step_failure_data.user_failure_data
    ]
    return Run(made, reasons[0] if reasons else None)


ALL = {
    (asset, shard)
    for asset in ("training_files", "shard_word_counts")
    for shard in ("tinytext_part_0", "tinytext_part_1")
}


def test_what_a_store_has_already_is_told_to_a_new_history_once_and_shown_again(
    store: FileStore, ingest: Ingest, tmp_path: Path
) -> None:
    with dg.instance_for_test() as other:
        assert run_ingestion(other).made == ALL
    assert ingest().made == ALL
    view = tmp_path / "data" / "raw" / "tinytext_part_0.parquet"
    assert view.exists()
    view.unlink()
    again = ingest()
    assert again == Run(set(), None)
    assert view.exists()


def test_a_damaged_shard_is_named_and_the_others_are_counted(store: FileStore, ingest: Ingest) -> None:
    source = get_source("tinytext")
    assert not ingest_shards(store, source, source.training_shards()).failed
    record = read_record(store, "tinytext", "tinytext_part_0")
    assert record is not None
    data = bytearray(store.get(record.key))
    data[len(data) // 2] ^= 1
    store.put(record.key, bytes(data))
    result = ingest()
    assert "1 of 2 shards failed: tinytext_part_0: " in str(result.failure)
    assert ("shard_word_counts", "tinytext_part_1") in result.made
    assert ("shard_word_counts", "tinytext_part_0") not in result.made


def test_a_source_that_cannot_be_used_does_not_stop_another(store: FileStore, ingest: Ingest) -> None:
    store.put("shards/fineweb-edu/revision.json", b"{")
    result = ingest("shard_01821", "tinytext_part_0")
    assert "1 of 2 shards failed: shard_01821: shards/fineweb-edu/revision.json is not JSON" in str(
        result.failure
    )
    assert ("training_files", "tinytext_part_0") in result.made


def test_a_misspelt_mode_is_refused_before_anything_is_fetched(store: FileStore, ingest: Ingest) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match="refrence"):
        ingest(mode="refrence")
    assert list(store.list("")) == []
    assert ingest(mode="reference").made == ALL, "a folder has no hub to refer to, so it is copied"
    record = read_record(store, "tinytext", "tinytext_part_0")
    assert record is not None
    assert record.mode == "copy"


@pytest.mark.parametrize(
    ("launcher", "config", "mode"),
    [
        ("local", {}, "copy"),
        ("runpod", {}, "reference"),
        ("runpod", {"mode": "copy"}, "copy"),
        ("local", {"mode": "reference"}, "reference"),
    ],
)
def test_hub_shards_are_copied_where_training_is_local_and_referenced_where_it_is_not(
    store: FileStore,
    ingest: Ingest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    config: dict[str, str],
    mode: str,
) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["some words"] * 9}), folder / "shard_01821.parquet")
    monkeypatch.setenv("NANOCHAT_LAUNCHER", launcher)
    with running_hub(repos={"karpathy/fineweb-edu-100b-shuffle": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        result = ingest("shard_01821", "shard_01821", **config)
    assert result.failure is None
    record = read_record(store, "fineweb-edu", "shard_01821")
    assert record is not None
    assert record.mode == mode
    assert (store.head(record.key) is None) == (mode == "reference")


def test_what_is_left_out_is_told_when_the_code_location_loads(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes.py"
    recipes.write_text("RECIPES = [{'name': 'broken'}]\n")
    code = "import dagster_nanochat.partitions as p; print(len(p.shard_partitions.get_partition_keys()))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "NANOCHAT_SOURCES": f"folder:stories={tmp_path}/nowhere",
            "NANOCHAT_RECIPES": str(recipes),
        },
    )
    assert int(result.stdout) == 8 + 1822
    assert result.stderr.count("left out: source stories: ") == 1
    assert "nowhere is not a folder" in result.stderr
    assert result.stderr.count(f"left out: {recipes}") == 1
