"""What the quick model must be able to do, read from the receipts of the one that was built here.

`make quickstart` trains it, and CI runs that before the tests. Where it was not built, these are
skipped, saying so.
"""

from __future__ import annotations

import pytest

from nanochat.recipes import quick
from nanochat.stages import Status, resolve
from nanochat.store import open_store, project_root
from nanochat.store.receipts import Receipt

STORE = open_store(str(project_root() / "data" / "store"))


@pytest.fixture(scope="module")
def receipts() -> dict[str, Receipt]:
    states = resolve(quick(), STORE)
    if any(state.status is not Status.FRESH for state in states.values()):
        pytest.skip("the quick model of this code is not built here: run `make quickstart` first")
    return {name: state.receipt for name, state in states.items() if state.receipt}


def share(receipt: Receipt, skill: str) -> float:
    return receipt.metrics[f"skill_{skill}_correct"] / receipt.metrics[f"skill_{skill}_questions"]


def test_it_says_its_name(receipts: dict[str, Receipt]) -> None:
    from nanochat.inference.chat import load_chat

    assert "NanoChat" in load_chat(STORE, "quick").ask("What is your name?").text


def test_it_says_its_name_to_at_least_16_of_20_unseen_paraphrases(receipts: dict[str, Receipt]) -> None:
    assert receipts["sft"].metrics["skill_name_questions"] == 20
    assert receipts["sft"].metrics["skill_name_correct"] >= 16


@pytest.mark.parametrize(("skill", "least"), [("sums", 0.95), ("letter_counts", 0.75), ("spelling", 0.55)])
def test_it_answers_held_out_questions(receipts: dict[str, Receipt], skill: str, least: float) -> None:
    assert receipts["sft"].metrics[f"skill_{skill}_questions"] >= 100
    assert share(receipts["sft"], skill) >= least


def test_its_bits_per_byte_are_a_quarter_below_a_kneser_ney_bigram(receipts: dict[str, Receipt]) -> None:
    metrics = receipts["base"].metrics
    assert metrics["val_bpb"] <= 0.75 * metrics["bigram_bpb"]
    for other in ("unigram_bpb", "trigram_bpb", "zlib_9_bpb", "lzma_9e_bpb"):
        assert metrics[other] > 0


def test_its_receipts_hold(receipts: dict[str, Receipt]) -> None:
    from nanochat.store.digests import digest_bytes

    for receipt in receipts.values():
        for file in receipt.outputs:
            assert digest_bytes(STORE.get(file.key)) == file.sha256, file.key
