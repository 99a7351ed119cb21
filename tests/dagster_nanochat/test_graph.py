"""The whole graph for a tiny model through Dagster: built once, then fresh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
from dagster._core.definitions.asset_checks.asset_check_spec import AssetCheckKey
from safetensors import safe_open
from standins.mutations import ARTEFACTS, copy_of, find, mutations, read_everything

from nanochat.events import EventStream
from nanochat.stages import Status, resolve
from nanochat.store import FileStore
from nanochat.store.receipts import current_receipt, point

TRAINING = ("base", "midtrain", "sft")
# What a machine may know and nobody may read: planted where the graph is built, looked for afterwards.
SECRETS = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")
CANARY = "canary-3b1f9a"


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    """A store and a Dagster history of their own, and a way to run a job in them."""
    from dagster_nanochat.definitions import defs
    from dagster_nanochat.partitions import recipe_book

    root = tmp_path_factory.mktemp("project")
    module_environment.setenv("NANOCHAT_STORE", str(root / "data" / "store"))
    home = tmp_path_factory.mktemp("dagster")
    for secret in SECRETS:
        module_environment.setenv(secret, f"{CANARY}-{secret}")
    with dg.instance_for_test(temp_dir=str(home)) as instance:
        definitions = defs()

        def run(job: str, tags: dict[str, str], **config: object) -> dg.ExecuteInProcessResult:
            return definitions.resolve_job_def(job).execute_in_process(
                instance=instance, tags=tags, run_config=config or None, raise_on_error=False
            )

        yield SimpleNamespace(
            root=root,
            store=FileStore(root / "data" / "store"),
            run=run,
            instance=instance,
            home=home,
            recipe=recipe_book()["tiny"],
        )


SHARDS = {
    "dagster/asset_partition_range_start": "tinytext_part_0",
    "dagster/asset_partition_range_end": "tinytext_part_1",
}
TINY = {"dagster/partition": "tiny"}


@pytest.fixture(scope="module")
def built(project: SimpleNamespace) -> SimpleNamespace:
    """The tiny model, built from nothing."""
    project.ingested = project.run("ingest_shards", SHARDS)
    project.trained = project.run("model_training", TINY)
    return project


def failures(result: dg.ExecuteInProcessResult) -> list[str]:
    return [
        f"{event.step_key}: {event.step_failure_data.error.to_string()[:2000]}"
        for event in result.all_events
        if event.is_step_failure
    ]


def test_every_asset_is_materialized(built: SimpleNamespace) -> None:
    assert failures(built.ingested) == []
    assert failures(built.trained) == []
    made: dict[str, set[str]] = {}
    for result in (built.ingested, built.trained):
        for event in result.all_events:
            if event.is_step_materialization:
                made.setdefault(event.asset_key.to_user_string(), set()).add(event.partition)
    shards = {"tinytext_part_0", "tinytext_part_1"}
    assert made == {
        "training_files": shards,
        "shard_word_counts": shards,
        **{
            key: {"tiny"}
            for key in (
                "validation_files",
                "tokenizer_training",
                "model_run_config",
                "base_model_checkpoint",
                "midtraining_datasets",
                "midtraining_run_config",
                "midtraining_checkpoint",
                "sft_datasets",
                "sft_run_config",
                "sft_checkpoint",
                "model_report",
                "nanochat_serverless_image",
                "serverless_endpoint",
                "chat_inference",
            )
        },
    }


def test_every_stage_is_fresh_with_a_verified_receipt(built: SimpleNamespace) -> None:
    states = resolve(built.recipe, built.store)
    assert {name: state.status for name, state in states.items()} == dict.fromkeys(states, Status.FRESH)


def test_every_optimisation_step_is_in_the_event_stream(built: SimpleNamespace) -> None:
    for stage, steps in zip(TRAINING, (12, 6, 4), strict=True):
        receipt = current_receipt(built.store, "tiny", stage)
        assert receipt is not None
        assert receipt.events_key is not None
        events = EventStream(built.store, receipt.events_key).all()
        found = [event for event in events if event["type"] == "step"]
        assert [event["step"] for event in found] == list(range(1, steps + 1))
        assert all(event["loss"] > 0 for event in found)
        assert events[0]["type"] == "attempt_started"
        assert events[-1]["type"] == "finished"


def test_metrics_of_a_stage_are_observed_on_its_live_asset(built: SimpleNamespace) -> None:
    records = built.instance.fetch_observations(
        dg.AssetKey(["live_metrics", "tiny", "base"]), limit=200
    ).records
    assert 12 <= len(records) <= 100
    names = set().union(*(record.asset_observation.metadata for record in records))
    assert {"loss", "matrix_lr", "tokens_per_s", "eta_s", "memory_bytes", "val_bpb"} <= names


def test_every_check_has_an_evaluation_with_its_partition(built: SimpleNamespace) -> None:
    checks = {
        "tokenizer_training": [
            "tokenizer_file_valid",
            "tokenizer_encode_decode",
            "tokenizer_compression_ratio",
            *(f"tokenizer_vs_gpt2_{domain}" for domain in ("news", "korean", "code", "science")),
        ],
        "base_model_checkpoint": ["base_val_bpb"],
        "sft_checkpoint": ["sft_mmlu_accuracy", "sft_arc_easy_accuracy"],
        "serverless_endpoint": ["serverless_endpoint_exists", "endpoint_runs_latest_image"],
    }
    storage = built.instance.event_log_storage
    for asset, names in checks.items():
        for name in names:
            (record,) = storage.get_asset_check_execution_history(
                AssetCheckKey(dg.AssetKey(asset), name), limit=5
            )
            assert record.partition == "tiny", name
            assert record.event is not None, name
    shards = storage.get_asset_check_execution_history(
        AssetCheckKey(dg.AssetKey("training_files"), "shards_verified"), limit=5
    )
    assert {record.partition for record in shards} == {"tinytext_part_0", "tinytext_part_1"}


def test_on_this_machine_nothing_is_deployed_and_the_answer_comes_from_here(built: SimpleNamespace) -> None:
    made = {
        event.asset_key.to_user_string(): event.materialization.metadata
        for event in built.trained.all_events
        if event.is_step_materialization
    }
    assert made["serverless_endpoint"]["deployed"].value is False
    assert made["serverless_endpoint"]["reason"].value == "the local launcher deploys nothing"
    assert made["nanochat_serverless_image"]["needed"].value is False
    chat = made["chat_inference"]
    assert (chat["answered_by"].value, chat["dollars"].value) == ("this machine", 0.0)
    assert chat["answer"].value
    assert chat["tokens"].value > 0
    checks = {check.check_name: check for check in built.trained.get_asset_check_evaluations()}
    for name in ("serverless_endpoint_exists", "endpoint_runs_latest_image"):
        assert (checks[name].passed, checks[name].description) == (
            True,
            "the local launcher deploys nothing",
        )


def test_a_conversation_is_answered_from_its_last_turn(built: SimpleNamespace) -> None:
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "Who are you?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    result = materialize(built, "chat_inference", "tiny", messages=messages)
    assert failures(result) == []
    (event,) = result.get_asset_materialization_events()
    assert event.materialization.metadata["question"].value == "Who are you?"
    assert event.materialization.metadata["messages"].value == messages
    for wrong in (messages[:2], [{"role": "tool", "content": "x"}], [{"role": "user"}]):
        (said,) = failures(materialize(built, "chat_inference", "tiny", messages=wrong))
        assert "messages" in said


def test_a_stage_shows_its_loss_curve_metrics_and_samples(built: SimpleNamespace) -> None:
    event = built.instance.get_latest_materialization_event(dg.AssetKey("base_model_checkpoint"))
    metadata = event.asset_materialization.metadata
    assert metadata["loss_curve"].value.startswith("![loss curve](data:image/png;base64,")
    assert "val_bpb" in metadata["metrics"].value
    assert "The" in metadata["samples"].value
    assert metadata["fingerprint"].value in metadata["outputs"].value


def test_the_folders_that_people_expect_are_there(built: SimpleNamespace) -> None:
    data = built.root / "data"
    for path in (
        "raw/tinytext_part_0.parquet",
        "validation/tinytext_part_2.parquet",
        "tokenizer/tiny/tokenizer.json",
        "checkpoints/tiny/model.safetensors",
        "mid_checkpoints/tiny/model.safetensors",
        "sft_checkpoints/tiny/model.safetensors",
        "reports/tiny/report.md",
        "reports/tiny/base_loss.png",
    ):
        assert (data / path).is_file(), path


def test_the_inference_folder_holds_weights_tokenizer_and_their_digests(built: SimpleNamespace) -> None:
    from nanochat.store.digests import digest_file

    folder = built.root / "checkpoint" / "tiny"
    card = json.loads((folder / "checkpoint.json").read_text())
    assert set(card["files"]) == {"model.safetensors", "model.json", "tokenizer.json"}
    for name, file in card["files"].items():
        assert digest_file(folder / name) == file["sha256"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == 6 * 2 + 2


def test_the_tokenizer_records_what_it_took_and_how_well_it_compresses(built: SimpleNamespace) -> None:
    receipt = current_receipt(built.store, "tiny", "tokenizer")
    assert receipt is not None
    names = {"unique_words", "merge_seconds", "peak_memory_bytes", "bytes_per_token"}
    assert names <= set(receipt.metrics)
    # A vocabulary of 400 ids joins something, but hardly whole words.
    assert 1.2 < receipt.metrics["bytes_per_token"] < 4
    (measured,) = receipt.tables["compression"]
    assert measured["bytes_per_token"] == pytest.approx(receipt.metrics["bytes_per_token"], abs=1e-4)
    assert str(measured["shard"]).startswith("tinytext_")
    made = {
        event.asset_key.to_user_string(): event.materialization.metadata
        for event in built.trained.all_events
        if event.is_step_materialization
    }
    assert names <= set(made["tokenizer_training"])


def test_the_report_tells_lineage_data_and_metrics(built: SimpleNamespace) -> None:
    text = (built.root / "data" / "reports" / "tiny" / "report.md").read_text()
    for heading in ("# tiny", "## Lineage", "## Data", "## base", "## sft", "## Recipe"):
        assert heading in text
    document = json.loads((built.root / "data" / "reports" / "tiny" / "report.json").read_text())
    assert document["stages"]["base"]["metrics"]["val_bpb"] > 0


def materialize(
    project: SimpleNamespace, asset: str, model: str, **config: object
) -> dg.ExecuteInProcessResult:
    """One asset alone, for one model."""
    from dagster_nanochat.definitions import defs

    definitions = defs()
    return dg.materialize(
        [one for one in definitions.assets if isinstance(one, dg.AssetsDefinition)],
        selection=[asset],
        partition_key=model,
        instance=project.instance,
        resources=definitions.resources,
        run_config={"ops": {asset: {"config": config}}},
        raise_on_error=False,
    )


def test_the_model_is_exported_and_the_page_says_what_was_found_equal(built: SimpleNamespace) -> None:
    from nanochat.huggingface.export import read_export

    result = materialize(built, "huggingface_export", "tiny")
    assert failures(result) == []
    metadata = result.asset_materializations_for_node("huggingface_export")[0].metadata
    folder = built.root / "data" / "exports" / "tiny"
    assert metadata["path"].value == str(folder)
    receipt = current_receipt(built.store, "tiny", "sft")
    assert receipt is not None
    assert read_export(folder).receipt_sha256 == receipt.digest()
    assert metadata["equal_logits"].value >= 9
    assert "| tinytext, validation | bits per byte |" in metadata["card"].value
    failed = materialize(built, "huggingface_export", "slow")
    assert any("'slow' is not built yet" in failure for failure in failures(failed))


def test_without_transformers_the_export_fails_with_the_remedy(
    built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (failure,) = failures(materialize(built, "huggingface_export", "tiny", source="base"))
    assert "pip install 'transformers>=" in failure


def test_a_second_run_trains_nothing_and_says_so(
    built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    real = subprocess.Popen

    def watched(*args: object, **kwargs: object) -> object:
        started.append(args[0] if args else kwargs.get("args"))
        return real(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", watched)
    # Another machine's cores are no reason to train anything anew.
    monkeypatch.setenv("NANOCHAT_THREADS", "2")
    monkeypatch.setenv("NANOCHAT_PROCESSES", "2")
    before = {stage: current_receipt(built.store, "tiny", stage) for stage in TRAINING}
    result = built.run("model_training", TINY)
    assert failures(result) == []
    assert {stage: current_receipt(built.store, "tiny", stage) for stage in TRAINING} == before
    assert not [command for command in started if "supervisor" in str(command) or "torch" in str(command)]
    reused = {
        event.asset_key.to_user_string(): event.materialization.metadata["reused"].value
        for event in result.all_events
        if event.is_step_materialization and "reused" in event.materialization.metadata
    }
    assert set(reused.values()) == {True}
    assert {"tokenizer_training", "base_model_checkpoint", "sft_checkpoint"} <= set(reused)


def test_two_models_with_an_equal_base_pay_for_one(built: SimpleNamespace) -> None:
    # As if twin had been fine-tuned before that was switched off.
    point(built.store, "twin", "sft", current_receipt(built.store, "tiny", "sft").fingerprint)
    result = built.run("model_training", {"dagster/partition": "twin"})
    assert failures(result) == []
    made = {
        event.asset_key.to_user_string(): event.materialization.metadata
        for event in result.all_events
        if event.is_step_materialization
    }
    assert made["base_model_checkpoint"]["reused"].value is True
    assert made["sft_checkpoint"]["switched_off"].value is True
    assert made["chat_inference"]["switched_off"].value is True
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    for name in ("sft_mmlu_accuracy", "sft_arc_easy_accuracy"):
        assert (checks[name].passed, checks[name].description) == (True, "switched off")
    assert not (built.root / "checkpoint" / "twin").exists()
    twin, tiny = (current_receipt(built.store, model, "base") for model in ("twin", "tiny"))
    assert twin == tiny


def test_no_secret_of_the_environment_is_written_anywhere(built: SimpleNamespace) -> None:
    files = [path for folder in (built.root, built.home) for path in folder.rglob("*") if path.is_file()]
    assert {"events.jsonl", "report.md", "receipt.json"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_store_in_order_gives_nobody_cause_to_complain(built: SimpleNamespace, tmp_path: Path) -> None:
    assert read_everything(built.store, built.recipe, tmp_path) == []


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_a_mutated_artefact_is_refused_by_name(built: SimpleNamespace, artefact: str, tmp_path: Path) -> None:
    pattern, other = ARTEFACTS[artefact]
    touched = tmp_path / "unpickled"
    store = copy_of(built.store, tmp_path / "store")
    path, sibling = find(store, pattern), find(store, other)
    content = path.read_bytes()
    names = {path.relative_to(store.root).as_posix(), path.name if "shards" not in path.parts else path.stem}
    unnamed = []
    for what, mutated in mutations(content, sibling.read_bytes(), touched):
        if mutated == content:
            continue
        path.write_bytes(mutated)
        said = read_everything(store, built.recipe, tmp_path / "work")
        mended = path.read_bytes() == content
        if not mended and not any(name in words for name in names for words in said):
            unnamed.append((what, said))
        path.write_bytes(content)
    assert unnamed == []
    assert not touched.exists(), "something was unpickled"


def test_forcing_a_stage_makes_what_was_built_on_it_stale(built: SimpleNamespace) -> None:
    before = current_receipt(built.store, "tiny", "midtrain")
    result = materialize(built, "midtraining_checkpoint", "tiny", force=True)
    assert failures(result) == []
    after = current_receipt(built.store, "tiny", "midtrain")
    assert before is not None
    assert after is not None
    assert (before.fingerprint, before.token != after.token) == (after.fingerprint, True)
    states = resolve(built.recipe, built.store)
    assert states["base"].status is Status.FRESH
    assert states["sft"].status is Status.STALE
    assert "its input midtrain was rebuilt" in states["sft"].reasons[0]
