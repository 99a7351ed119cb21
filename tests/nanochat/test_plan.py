"""Plans: what is counted in the store is used, what is guessed is named, and rounding is training's."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nanochat.plan import StagePlan, mixture_rows, plan_stage, token_count_key
from nanochat.recipes import Ingredient, Recipe, from_depth
from nanochat.stages import STAGES, StageState, Status
from nanochat.store import FileStore, project_root
from nanochat.store.receipts import FileRef, Receipt

TOKENIZER = "a" * 64


def recipe() -> Recipe:
    """An eighth of a batch more than whole steps in both chat stages."""
    derived = from_depth(4)
    assert derived.midtrain is not None
    assert derived.sft is not None
    mixture = (Ingredient(task="smoltalk", rows=100),)
    return derived.replace(
        midtrain=dataclasses.replace(derived.midtrain, mixture=mixture, batch_tokens=2048),
        sft=dataclasses.replace(derived.sft, mixture=mixture),
    )


def state(stage: str, *, receipt: Receipt | None = None, fingerprint: str | None = None) -> StageState:
    return StageState(
        spec=STAGES[stage],
        identity=None,
        fingerprint=fingerprint,
        status=Status.MISSING,
        good=False,
        reasons=(),
        needs=(),
        receipt=receipt,
        lease=None,
    )


def written(stage: str, rows: int) -> StageState:
    """A data stage whose mixture is written."""
    receipt = Receipt(
        stage=stage,
        stage_version=1,
        fingerprint="f",
        token="t",
        created_at="2026-01-01T00:00:00Z",
        seconds=1.0,
        outputs=(FileRef(key=f"{stage}/train.jsonl", size_bytes=0, sha256="0" * 64),),
        metrics={"rows": float(rows), "characters": 33_000.0},
    )
    return state(stage, receipt=receipt, fingerprint="f")


def plan(store: FileStore, stage: str, data: StageState) -> StagePlan:
    states = {
        "tokenizer": state("tokenizer", fingerprint=TOKENIZER),
        data.spec.name: data,
        stage: state(stage),
    }
    return plan_stage(recipe(), stage, states, store, flops_per_s=1e12, usd_per_h=2.0)


@pytest.mark.parametrize("stage", ["midtrain", "sft"])
def test_tokens_that_were_counted_are_used_and_steps_are_rounded_up(tmp_store: FileStore, stage: str) -> None:
    data = written(f"{stage}_data", rows=100)
    guess = plan(tmp_store, stage, data)
    assert "tokens" in guess.estimated
    key = token_count_key(f"{stage}_data/train.jsonl", TOKENIZER)
    tmp_store.put(key, json.dumps({"tokens": 20_736}).encode())
    counted = plan(tmp_store, stage, data)
    if stage == "midtrain":
        assert (counted.steps, counted.tokens) == (11, 20_736)
        assert counted.estimated == ("steps",)
    else:
        # Four batches of 32 see 28 of the 100 conversations again.
        assert (counted.steps, counted.tokens) == (4, round(20_736 * 1.28))
        assert counted.estimated == ()
    assert counted.dollars == pytest.approx(2.0 * (counted.hours or math.nan))


def test_what_is_not_written_is_guessed_and_said_to_be(tmp_store: FileStore) -> None:
    for stage in ("midtrain", "sft"):
        assert plan(tmp_store, stage, state(f"{stage}_data")).estimated == ("steps", "tokens")


def test_the_identity_conversations_are_counted_in_the_file_that_is_shipped() -> None:
    lines = (project_root() / "data" / "identity_conversations.jsonl").read_text("utf-8").splitlines()
    assert mixture_rows((Ingredient(task="identity", repeat=2),)) == 2 * len(lines)
