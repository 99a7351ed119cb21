"""The code location: light to load, with the public names, and two kinds of partition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import dagster as dg
import pytest

PROBE = """
import json, sys, time
from dagster_nanochat.definitions import defs
defs().get_repository_def()  # imports the modules
started = time.process_time()
repository = defs().get_repository_def()
print(json.dumps({
    "seconds": time.process_time() - started,
    "heavy": sorted(
        {"torch", "numpy", "pyarrow", "matplotlib", "transformers", "huggingface_hub", "httpx"}
        & set(sys.modules)
    ),
    "assets": sorted(key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()),
    "jobs": sorted(repository.job_names),
}))
"""


@pytest.fixture(scope="module")
def location() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NANOCHAT_")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_loading_imports_nothing_heavy(location: dict[str, Any]) -> None:
    assert location["heavy"] == []


def test_loading_takes_dagster_less_than_half_a_second(location: dict[str, Any]) -> None:
    assert location["seconds"] < 0.5


def test_the_public_names_are_there(location: dict[str, Any]) -> None:
    assert {
        "training_files",
        "shard_word_counts",
        "validation_files",
        "tokenizer_training",
        "model_run_config",
        "base_model_checkpoint",
        "nanochat_training_image",
        "nanochat_serverless_image",
        "serverless_endpoint",
        "midtraining_datasets",
        "midtraining_run_config",
        "midtraining_checkpoint",
        "sft_datasets",
        "sft_run_config",
        "sft_checkpoint",
        "model_report",
        "huggingface_export",
        "chat_inference",
    } <= set(location["assets"])
    assert {
        "ingest_shards",
        "model_training",
        "nanochat_quick",
        "nanochat_1_dollar",
        "nanochat_10_dollar",
        "nanochat_100_dollar",
        "deploy_model",
    } <= set(location["jobs"])


def test_every_asset_but_the_images_is_by_shard_or_by_model() -> None:
    from dagster_nanochat.definitions import defs
    from dagster_nanochat.partitions import model_partitions, shard_partitions

    graph = defs().get_repository_def().asset_graph
    for key in graph.materializable_asset_keys - {dg.AssetKey("nanochat_training_image")}:
        assert graph.get(key).partitions_def in (shard_partitions, model_partitions), key
    for key in graph.asset_check_keys:
        assert graph.get(key).partitions_def in (shard_partitions, model_partitions), key


def test_no_job_looks_at_the_registry_unasked() -> None:
    from dagster_nanochat.definitions import defs

    repository = defs().get_repository_def()
    image = dg.AssetKey("nanochat_training_image")
    assert all(
        image not in repository.get_job(name).asset_layer.selected_asset_keys
        for name in repository.job_names
        if not name.startswith("__")
    )


def test_a_model_descends_from_its_recipes_shards_alone() -> None:
    from dagster_nanochat.definitions import defs
    from dagster_nanochat.partitions import recipe_book, shard_partitions

    graph = defs().get_repository_def().asset_graph
    mapping = graph.get_partition_mapping(dg.AssetKey("base_model_checkpoint"), dg.AssetKey("training_files"))
    assert isinstance(mapping, dg.StaticPartitionMapping)
    parents = {
        name: [
            shard
            for shard in shard_partitions.get_partition_keys()
            if name in mapping._mapping.get(shard, ())  # the public ways need a whole instance
        ]
        for name in ("quick", "d4", "tiny")
    }
    assert parents["quick"] == [f"offline_{index:05d}" for index in range(8)]
    assert parents["d4"] == [f"shard_{index:05d}" for index in range(8)]
    assert len(parents["tiny"]) == recipe_book()["tiny"].data.shards


def test_the_refresh_schedule_is_off_until_somebody_switches_it_on() -> None:
    from dagster_nanochat.definitions import defs

    schedule = defs().get_repository_def().get_schedule_def("refresh_quick")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED


def test_an_unknown_launcher_is_refused_by_name(tmp_store, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster_nanochat.resources import LauncherResource

    monkeypatch.setenv("NANOCHAT_LAUNCHER", "moonbase")
    with pytest.raises(dg.Failure, match="unknown launcher 'moonbase'"):
        LauncherResource().create(tmp_store)
