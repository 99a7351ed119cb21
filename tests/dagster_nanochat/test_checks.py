"""Every asset check has something it passes and something it fails, and keeps its partition."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.asset_checks.asset_check_spec import AssetCheckKey

import rustbpe
from nanochat.data.shards import ingest_shards, read_record
from nanochat.data.sources import get_source
from nanochat.evaluation.tokenizer_quality import evaluation_texts
from nanochat.recipes import SPECIAL_TOKENS, gpt4_pattern
from nanochat.store import FileStore
from nanochat.store.digests import digest_bytes
from nanochat.store.leases import utc_now
from nanochat.store.receipts import FileRef, Receipt, point, write_receipt

Evaluate = Callable[[str, str], dg.AssetCheckEvaluation]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("NANOCHAT_STORE", str(tmp_path / "store"))
    return FileStore(tmp_path / "store")


@pytest.fixture
def evaluate(store: FileStore) -> Iterator[Evaluate]:
    """evaluate(asset, check, partition) runs the check alone and returns its stored evaluation."""
    from dagster_nanochat.definitions import defs

    definitions = defs()
    with dg.instance_for_test() as instance:

        def run(asset: str, check: str, partition: str = "tiny") -> dg.AssetCheckEvaluation:
            key = AssetCheckKey(dg.AssetKey(asset), check)
            job = dg.Definitions(
                assets=definitions.assets,
                asset_checks=definitions.asset_checks,
                resources=definitions.resources,
                jobs=[dg.define_asset_job("checks", selection=dg.AssetSelection.checks(key))],
            ).resolve_job_def("checks")
            result = job.execute_in_process(
                instance=instance, tags={"dagster/partition": partition}, raise_on_error=False
            )
            (evaluation,) = result.get_asset_check_evaluations()
            (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
            assert record.partition == partition
            assert evaluation.partition == partition
            return evaluation

        yield run


def put_receipt(store: FileStore, stage: str, metrics: dict[str, float], files: dict[str, bytes]) -> None:
    fingerprint = digest_bytes(json.dumps([stage, metrics, sorted(files)]).encode())
    outputs = []
    for name, data in files.items():
        key = f"stages/{stage}/{fingerprint[:12]}/output/{name}"
        store.put(key, data)
        outputs.append(FileRef(key=key, size_bytes=len(data), sha256=digest_bytes(data)))
    write_receipt(
        store,
        Receipt(
            stage=stage,
            stage_version=1,
            fingerprint=fingerprint,
            token="t",
            created_at=utc_now(),
            seconds=1,
            outputs=tuple(outputs),
            metrics=metrics,
        ),
    )
    point(store, "tiny", stage, fingerprint)


def put_tokenizer(store: FileStore, ranks: list[bytes]) -> None:
    document = {
        "schema": "nanochat.tokenizer",
        "version": 1,
        "pattern": gpt4_pattern(r"\p{N}{1,2}"),
        "ranks": [base64.b64encode(rank).decode() for rank in ranks],
        "special_tokens": {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)},
        "provenance": {},
    }
    put_receipt(store, "tokenizer", {}, {"tokenizer.json": json.dumps(document).encode()})


BYTES = [bytes([byte]) for byte in range(256)]


def trained_ranks() -> list[bytes]:
    """A vocabulary that knows the evaluation texts, so that it beats GPT-2's on them."""
    texts = [text.text for text in evaluation_texts().values()]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts * 3), 2100, gpt4_pattern(r"\p{N}{1,2}"))
    return [token for token, _ in trainer.get_mergeable_ranks()]


def test_tokenizer_file_valid(store: FileStore, evaluate: Evaluate) -> None:
    put_tokenizer(store, BYTES)
    assert evaluate("tokenizer_training", "tokenizer_file_valid").passed
    put_tokenizer(store, BYTES[1:])
    evaluation = evaluate("tokenizer_training", "tokenizer_file_valid")
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.ERROR


def test_tokenizer_encode_decode(
    store: FileStore, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tokenizer(store, BYTES)
    assert evaluate("tokenizer_training", "tokenizer_encode_decode").passed
    from nanochat.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "something else")
    assert not evaluate("tokenizer_training", "tokenizer_encode_decode").passed


@pytest.mark.parametrize("domain", ["news", "korean", "code", "science"])
def test_tokenizer_vs_gpt2_fails_three_times_worse_and_passes_better(
    store: FileStore, evaluate: Evaluate, domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat.tokenizer import Tokenizer

    put_tokenizer(store, BYTES)
    gpt2 = evaluation_texts()[domain].gpt2_tokens
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda self, text: [0] * (3 * gpt2))
        worse = evaluate("tokenizer_training", f"tokenizer_vs_gpt2_{domain}")
    assert worse.metadata["difference"].value == 2.0
    assert not worse.passed
    assert worse.severity is dg.AssetCheckSeverity.WARN
    put_tokenizer(store, trained_ranks())
    better = evaluate("tokenizer_training", f"tokenizer_vs_gpt2_{domain}")
    assert better.metadata["difference"].value < 0
    assert better.passed


def test_tokenizer_compression_ratio(store: FileStore, evaluate: Evaluate) -> None:
    source = get_source("tinytext")
    report = ingest_shards(store, source, [source.validation_shard()])
    assert not report.failed
    put_tokenizer(store, BYTES)
    assert not evaluate("tokenizer_training", "tokenizer_compression_ratio").passed
    put_tokenizer(store, trained_ranks())
    evaluation = evaluate("tokenizer_training", "tokenizer_compression_ratio")
    assert evaluation.passed
    assert evaluation.metadata["bytes_per_token"].value > 1.5


def test_shards_verified(store: FileStore, evaluate: Evaluate) -> None:
    source = get_source("tinytext")
    shard = source.training_shards()[0]
    assert not ingest_shards(store, source, [shard]).failed
    assert evaluate("training_files", "shards_verified", shard).passed
    record = read_record(store, source.name, shard)
    assert record is not None
    data = bytearray(store.get(record.key))
    data[len(data) // 2] ^= 1
    store.put(record.key, bytes(data))
    evaluation = evaluate("training_files", "shards_verified", shard)
    assert not evaluation.passed
    assert "damaged" in (evaluation.description or "")


def test_base_val_bpb(store: FileStore, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from dagster_nanochat import selection
    from dagster_nanochat.partitions import recipe_book

    tiny = recipe_book()["tiny"]
    strict = tiny.replace(evaluation=dataclasses.replace(tiny.evaluation, max_val_bpb=1.5))
    monkeypatch.setattr(
        selection, "recipe_book", lambda: dataclasses.replace(recipe_book(), recipes={"tiny": strict})
    )
    put_receipt(store, "base", {"val_bpb": 1.4, "bigram_bpb": 2.1}, {})
    good = evaluate("base_model_checkpoint", "base_val_bpb")
    assert good.passed
    assert "33% below a Kneser–Ney bigram" in (good.description or "")
    put_receipt(store, "base", {"val_bpb": 1.6}, {})
    assert not evaluate("base_model_checkpoint", "base_val_bpb").passed


@pytest.mark.parametrize(
    ("check", "name"), [("sft_mmlu_accuracy", "mmlu"), ("sft_arc_easy_accuracy", "arc_easy")]
)
def test_accuracy_with_questions_chance_and_interval(
    store: FileStore, evaluate: Evaluate, check: str, name: str
) -> None:
    def measured(correct: int) -> dict[str, float]:
        return {f"{name}_correct": correct, f"{name}_questions": 200, f"{name}_chance": 0.25}

    put_receipt(store, "sft", measured(100), {})
    good = evaluate("sft_checkpoint", check)
    assert good.passed
    values = {key: value.value for key, value in good.metadata.items()}
    assert (values["accuracy"], values["questions"], values["chance"]) == (0.5, 200, 0.25)
    assert 0.43 < values["interval_low"] < 0.5 < values["interval_high"] < 0.57
    put_receipt(store, "sft", measured(20), {})
    assert not evaluate("sft_checkpoint", check).passed
    put_receipt(store, "sft", {}, {})
    assert "was not measured" in (evaluate("sft_checkpoint", check).description or "")
