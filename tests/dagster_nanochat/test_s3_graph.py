"""The whole graph with its store in a bucket, against a real S3 server: built once, then fresh."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import dagster as dg
import pytest
from standins import s3

from nanochat.attempts import attempts
from nanochat.events import EventStream
from nanochat.inference.chat import load_chat
from nanochat.stages import TRAINING_STAGES, Status, resolve
from nanochat.store import open_store
from nanochat.store.receipts import current_receipt

pytestmark = [
    pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    """The tiny model, built twice in a bucket; views and local copies in folders of their own."""
    from dagster_nanochat.definitions import defs
    from dagster_nanochat.partitions import recipe_book

    root, home = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("dagster")
    with (
        s3.serve(tmp_path_factory.mktemp("s3") / "data") as server,
        dg.instance_for_test(temp_dir=str(home)) as instance,
    ):
        settings = {"NANOCHAT_STORE": f"s3://{s3.BUCKET}/models", "NANOCHAT_CACHE": str(root / "cache")}
        for name, value in {**server.environment, **settings}.items():
            module_environment.setenv(name, value)
        module_environment.setattr("dagster_nanochat.views.project_root", lambda: root)
        definitions, store = defs(), open_store()

        def run(job: str, **tags: str) -> dg.ExecuteInProcessResult:
            return definitions.resolve_job_def(job).execute_in_process(
                instance=instance, tags=tags, raise_on_error=False
            )

        shards = {"start": "tinytext_part_0", "end": "tinytext_part_1"}
        ingested = run(
            "ingest_shards", **{f"dagster/asset_partition_range_{k}": v for k, v in shards.items()}
        )
        first, second = (run("model_training", **{"dagster/partition": "tiny"}) for _ in range(2))
        yield SimpleNamespace(
            root=root,
            store=store,
            recipe=recipe_book()["tiny"],
            results=(ingested, first, second),
            second=second,
        )


def test_every_stage_is_built_once_and_then_fresh(built: SimpleNamespace) -> None:
    failed = [event.message for run in built.results for event in run.all_events if event.is_step_failure]
    assert failed == []
    states = resolve(built.recipe, built.store)
    assert {name: state.status for name, state in states.items()} == dict.fromkeys(states, Status.FRESH)
    assert [len(attempts(built.store, states[stage].prefix)) for stage in TRAINING_STAGES] == [1, 1, 1]
    reused = {
        event.asset_key.to_user_string(): event.materialization.metadata["reused"].value
        for event in built.second.all_events
        if event.is_step_materialization and "reused" in event.materialization.metadata
    }
    assert len(reused) == 6
    assert all(reused.values())


def test_every_optimisation_step_is_in_the_chunks_of_the_event_stream(built: SimpleNamespace) -> None:
    receipt = current_receipt(built.store, "tiny", "base")
    assert receipt is not None
    assert len(list(built.store.list(f"{receipt.events_key}/"))) > 1
    steps = [e["step"] for e in EventStream(built.store, receipt.events_key).all() if e["type"] == "step"]
    assert steps == list(range(1, built.recipe.base.steps + 1))


def test_views_and_chat_read_verified_copies(built: SimpleNamespace) -> None:
    receipt = current_receipt(built.store, "tiny", "sft")
    assert receipt is not None
    weights = receipt.output("model.safetensors")
    shown = built.root / "data" / "sft_checkpoints" / "tiny" / "model.safetensors"
    copy = built.root / "cache" / weights.sha256[:2] / weights.sha256
    assert shown.samefile(copy)
    assert isinstance(load_chat(built.store, "tiny").ask("What is your name?").text, str)
