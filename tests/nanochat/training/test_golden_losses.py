"""Thirty steps of each stage give the losses that were written down.

The data, the tokenizer and the model are made from fixed seeds, everything runs in float32 on one
thread. A change of the losses is a change of what is trained: where it is meant, raise the stage's
version and renew the file with

    NANOCHAT_WRITE_GOLDEN=1 pytest tests/nanochat/training/test_golden_losses.py
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workshop

    from nanochat.store.receipts import FileRef

GOLDEN = Path(__file__).parents[2] / "golden" / "losses.json"
STEPS = 30


def losses_of_all_stages(workshop: Workshop) -> dict[str, list[float]]:
    recipe = workshop.recipe
    quiet = {"steps": STEPS, "eval_every": 1000, "checkpoint_every": 1000}
    recipe = recipe.replace(
        **{
            stage: dataclasses.replace(getattr(recipe, stage), **quiet)
            for stage in ("base", "midtrain", "sft")
        }
    )
    found: dict[str, list[float]] = {}
    init: tuple[FileRef, ...] = ()
    for stage in ("base", "midtrain", "sft"):
        outcome = workshop.run(workshop.job(stage, init=init, recipe=recipe))
        found[stage] = list(outcome.losses.values())
        init = workshop.files_of(outcome)
    return found


def test_losses_are_those_of_the_golden_file(workshop: Workshop) -> None:
    found = losses_of_all_stages(workshop)
    if os.environ.get("NANOCHAT_WRITE_GOLDEN"):
        golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
        golden["losses"] = {stage: [round(loss, 5) for loss in losses] for stage, losses in found.items()}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found.keys() == golden["losses"].keys()
    for stage, losses in found.items():
        for step, (loss, expected) in enumerate(zip(losses, golden["losses"][stage], strict=True), start=1):
            assert loss == pytest.approx(expected, abs=golden["tolerance"]), f"{stage}, step {step}"
