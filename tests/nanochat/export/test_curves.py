"""Loss curves: of the whole stage where its receipt knows it, else as far as the events go."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat.events import encode_event
from nanochat.export.curves import loss_curve_png, receipt_curve_png
from nanochat.store import FileStore
from nanochat.store.receipts import Receipt

EVENTS = "attempts/last/events.jsonl"
CURVE = [{"step": step, "loss": 5.0 - step / 10} for step in range(1, 11)]
EVALUATIONS = [{"step": step, "val_bpb": 2.0 - step / 10} for step in (5, 10)]


def receipt(tables: dict[str, list[dict[str, Any]]]) -> Receipt:
    return Receipt(
        stage="base",
        stage_version=1,
        fingerprint="f",
        token="last",
        created_at="2026-01-01T00:00:00Z",
        seconds=1.0,
        outputs=(),
        tables=tables,
        events_key=EVENTS,
    )


@pytest.fixture
def resumed(tmp_store: FileStore) -> FileStore:
    """A store with the events of the last attempt, which resumed at step 8."""
    lines = [encode_event("step", **row) for row in CURVE[8:]]
    lines += [encode_event("eval", step=10, metrics={"val_bpb": 1.0})]
    tmp_store.append(EVENTS, b"".join(lines))
    return tmp_store


def test_the_curve_of_a_resumed_stage_covers_all_attempts(resumed: FileStore) -> None:
    whole = loss_curve_png(CURVE, EVALUATIONS, "x")
    assert receipt_curve_png(resumed, receipt({"curve": CURVE, "evaluations": EVALUATIONS}), "x") == whole


def test_without_a_curve_in_the_receipt_it_is_drawn_from_the_events(resumed: FileStore) -> None:
    part = loss_curve_png(CURVE[8:], EVALUATIONS[1:], "x")
    assert part is not None
    assert receipt_curve_png(resumed, receipt({}), "x") == part


def test_no_step_makes_no_picture(tmp_store: FileStore) -> None:
    assert receipt_curve_png(tmp_store, receipt({}), "x") is None
