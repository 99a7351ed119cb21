"""The model card says what the receipts say."""

from __future__ import annotations

import datetime
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from nanochat.huggingface.card import lineage, model_card
from nanochat.recipes import named_recipes
from nanochat.store import FileStore
from nanochat.store.receipts import AttemptCost, InputRef, Receipt, write_receipt

D20 = named_recipes()["d20"]


def receipt(stage: str, *inputs: Receipt, **fields: object) -> Receipt:
    return Receipt(
        stage=stage,
        stage_version=1,
        fingerprint=stage * 8,
        token=f"token-{stage}",
        created_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        seconds=10.0,
        inputs=tuple(
            InputRef(stage=one.stage, fingerprint=one.fingerprint, receipt_sha256=one.digest())
            for one in inputs
        ),
        outputs=(),
        **fields,
    )


def card(receipts: list[Receipt], *, chat: bool = True) -> ModelCard:
    return ModelCard(model_card(D20, D20.model, D20.tokenizer.vocab_size, receipts, chat=chat))


def test_the_results_of_a_model_are_in_the_metadata_as_the_hub_reads_them() -> None:
    base = receipt("base", metrics={"val_bpb": 0.8125, "tokens_per_s": 5.0})
    sft = receipt(
        "sft", base, metrics={"mmlu_correct": 30.0, "mmlu_questions": 120.0, "skill_sums_correct": 3.0}
    )
    made = card([base, sft])
    results = {
        (result.dataset_type, result.metric_type): result.metric_value for result in made.data.eval_results
    }
    assert results == {("fineweb-edu", "bits_per_byte"): 0.8125, ("mmlu", "accuracy"): 0.25}
    assert made.data.library_name == "transformers"
    assert made.data.datasets == ["karpathy/fineweb-edu-100b-shuffle"]
    assert "| mmlu, 120 questions | accuracy | 0.25 | sft |" in made.text


def test_a_model_without_results_makes_a_card_without_them() -> None:
    made = card([receipt("base")], chat=False)
    assert made.data.eval_results is None
    assert "conversational" not in made.data.tags
    front = yaml.safe_load(made.content.split("---\n")[1])
    assert "model-index" not in front


def test_lineage_and_cost_are_those_of_the_receipts() -> None:
    base = receipt(
        "base",
        code_revision="0123456789abcdef",
        attempts=(AttemptCost(token="a", seconds=100.0, dollars=1.5), AttemptCost(token="b", seconds=20.0)),
        data={f"shard_{index:05d}": f"{index:064x}" for index in range(20)},
    )
    text = card([base]).text
    assert f"| base | basebasebase | {base.digest()[:12]} | 120 | 1.5 | 0123456789 |" in text
    assert "shard_00011" in text
    assert "shard_00012" not in text
    assert "8 more" in text
    assert "560,988,160 parameters" in text


def test_lineage_leaves_out_what_was_rebuilt_since(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    tokenizer, base = receipt("tokenizer"), receipt("base", receipt("tokenizer"))
    sft = receipt("sft", base, tokenizer)
    for one in (tokenizer, base, sft):
        write_receipt(store, one)
    assert [one.stage for one in lineage(store, sft)] == ["tokenizer", "base", "sft"]
    write_receipt(store, receipt("base", tokenizer, warnings=("built again",)))
    assert [one.stage for one in lineage(store, sft)] == ["tokenizer", "sft"]
