"""Loss curves as pictures, from a receipt's tables or, while there is none, from the events."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanochat.events import Event, EventStream
from nanochat.store import ObjectStore
from nanochat.store.receipts import Receipt

# A training stage's tables that begin with a step: its loss over all attempts, and what was measured.
CURVE = "curve"
EVALUATIONS = "evaluations"

Rows = Sequence[Mapping[str, Any]]


def receipt_curve_png(store: ObjectStore, receipt: Receipt, title: str) -> bytes | None:
    """The curve of a stage over all its attempts; from its last one's events where the receipt has none."""
    if CURVE in receipt.tables:
        return loss_curve_png(receipt.tables[CURVE], receipt.tables.get(EVALUATIONS, ()), title)
    events = EventStream(store, receipt.events_key).all() if receipt.events_key else []
    return event_curve_png(events, title)


def event_curve_png(events: Iterable[Event], title: str) -> bytes | None:
    """The curve of an attempt as far as it has come."""
    curve, evaluations = [], []
    for event in events:
        if event["type"] == "step":
            curve.append({"step": event["step"], "loss": event.get("loss")})
        elif event["type"] == "eval":
            evaluations.append({"step": event["step"], **event["metrics"]})
    return loss_curve_png(curve, evaluations, title)


def loss_curve_png(curve: Rows, evaluations: Rows, title: str) -> bytes | None:
    """Rows of ``step`` and ``loss``, and of ``step`` and metrics, as a PNG; None where no step was taken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = _points(curve, "loss")
    bpb = _points(evaluations, "val_bpb")
    if not steps:
        return None
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(list(steps), list(steps.values()), linewidth=0.8, alpha=0.35, color="C0")
    axes.plot(list(steps), _smooth(list(steps.values())), linewidth=1.6, color="C0", label="training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    if bpb:
        right = axes.twinx()
        right.plot(list(bpb), list(bpb.values()), "o--", color="C1", label="validation bits per byte")
        right.set_ylabel("bits per byte")
        lines = [*axes.get_lines()[1:], *right.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    else:
        axes.legend(loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _points(rows: Rows, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows if row.get(name) is not None}


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean whose memory is some sixtieth of the curve."""
    weight = max(0.0, 1.0 - 60 / len(values))
    smoothed, average, norm = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(average / norm)
    return smoothed
