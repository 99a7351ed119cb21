"""Loss curves as pictures."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from nanochat.events import Event


def loss_curve_png(events: Iterable[Event], title: str) -> bytes | None:
    """The loss of every step and the evaluations, as a PNG; None where no step was taken."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps: dict[int, float] = {}
    evaluations: dict[str, dict[int, float]] = {}
    for event in events:
        if event["type"] == "step" and event.get("loss") is not None:
            steps[event["step"]] = event["loss"]
        elif event["type"] == "eval":
            for name, value in event["metrics"].items():
                if value is not None:
                    evaluations.setdefault(name, {})[event["step"]] = value
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
    bpb = evaluations.get("val_bpb")
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


def _smooth(values: Sequence[float], weight: float = 0.96) -> list[float]:
    smoothed, average, norm = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(average / norm)
    return smoothed
