"""The report card counts what a stage took over all its attempts."""

from __future__ import annotations

import pytest

from nanochat.export.report import make_report, total_seconds
from nanochat.recipes import quick
from nanochat.stages import STAGES, StageState, Status
from nanochat.store import FileStore
from nanochat.store.receipts import AttemptCost, Receipt


def receipt(*attempts: AttemptCost) -> Receipt:
    return Receipt(
        stage="base",
        stage_version=1,
        fingerprint="f",
        token="b",
        created_at="2026-01-01T00:00:00Z",
        seconds=50.0,
        outputs=(),
        attempts=attempts,
        tables={"curve": [{"step": 1, "loss": 5.0}], "bits_per_byte": [{"predictor": "bigram"}]},
        hardware={"machine": "x86_64", "cpu": "A Processor"},
    )


INTERRUPTED = AttemptCost(token="a", seconds=100.0, dollars=2.0, outcome="interrupted")
LAST = AttemptCost(token="b", seconds=50.0, dollars=1.0)


def test_interrupted_attempts_count_in_seconds_and_dollars(tmp_store: FileStore) -> None:
    state = StageState(
        spec=STAGES["base"],
        identity=None,
        fingerprint="f",
        status=Status.FRESH,
        good=True,
        reasons=(),
        needs=(),
        receipt=receipt(INTERRUPTED, LAST),
        lease=None,
    )
    report = make_report(quick(), {"base": state}, tmp_store)
    assert "Built in 150 s for $3.00." in report.markdown
    assert "A Processor" in report.markdown
    # The curve is a picture, not one more table.
    assert list(report.pictures) == ["base_loss.png"]
    assert "### bits per byte" in report.markdown
    assert "### curve" not in report.markdown


def test_a_receipt_that_does_not_tell_its_attempts_apart_has_its_own_seconds() -> None:
    assert total_seconds(receipt()) == pytest.approx(50.0)
