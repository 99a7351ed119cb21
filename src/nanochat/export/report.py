"""The report card of a model: where it comes from, what it cost, what it can do.

Everything in it is read from receipts and event streams; nothing is measured here.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

from nanochat.export.curves import CURVE, receipt_curve_png
from nanochat.export.markdown import table
from nanochat.recipes import Recipe, parameters
from nanochat.stages import TRAINING_STAGES, StageState
from nanochat.store import ObjectStore
from nanochat.store.receipts import Receipt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """`markdown` refers to the pictures by file name; `inlined()` carries them itself."""

    model: str
    markdown: str
    document: dict[str, Any]
    pictures: Mapping[str, bytes]

    def inlined(self) -> str:
        """The Markdown with its pictures as data URIs."""
        text = self.markdown
        for name, png in self.pictures.items():
            text = text.replace(f"({name})", f"(data:image/png;base64,{base64.b64encode(png).decode()})")
        return text


def make_report(recipe: Recipe, states: Mapping[str, StageState], store: ObjectStore) -> Report:
    """The report of a model from the receipts of its stages."""
    pictures: dict[str, bytes] = {}
    sections = [_head(recipe, states), _lineage(states), _data(states)]
    for stage in TRAINING_STAGES:
        state = states.get(stage)
        if state is None or state.receipt is None:
            continue
        receipt = state.receipt
        lines = [f"## {stage}", ""]
        png = receipt_curve_png(store, receipt, f"{recipe.name} · {stage}")
        if png:
            pictures[f"{stage}_loss.png"] = png
            lines += [f"![loss of {stage}]({stage}_loss.png)", ""]
        lines += [table([{"metric": k, "value": v} for k, v in sorted(receipt.metrics.items())]), ""]
        for name, rows in receipt.tables.items():
            if name == CURVE:  # the picture
                continue
            lines += [f"### {name.replace('_', ' ')}", "", table(rows), ""]
        if receipt.samples:
            lines += ["### Samples", "", table(receipt.samples), ""]
        if receipt.warnings:
            lines += ["### Warnings", "", *(f"- {warning}" for warning in receipt.warnings), ""]
        sections.append("\n".join(lines))
    sections.append(_settings(recipe))
    document = {
        "model": recipe.name,
        "recipe": recipe.to_json(),
        "stages": {
            name: None
            if state.receipt is None
            else {**state.receipt.model_dump(mode="json"), "status": state.status.value}
            for name, state in states.items()
        },
    }
    return Report(
        model=recipe.name, markdown="\n".join(sections).rstrip() + "\n", document=document, pictures=pictures
    )


def _head(recipe: Recipe, states: Mapping[str, StageState]) -> str:
    receipts = [state.receipt for state in states.values() if state.receipt]
    seconds = sum(total_seconds(receipt) for receipt in receipts)
    dollars = sum(receipt.dollars for receipt in receipts)
    size = parameters(recipe.model, recipe.tokenizer.vocab_size)
    return (
        f"# {recipe.name}\n\n{recipe.description}.\n\n"
        f"{size:,} parameters, {recipe.model.depth} layers, {recipe.model.width} wide, "
        f"{recipe.model.heads} heads, context {recipe.model.context}, vocabulary "
        f"{recipe.tokenizer.vocab_size:,}. Built in {seconds:,.0f} s for ${dollars:,.2f}.\n"
    )


def _lineage(states: Mapping[str, StageState]) -> str:
    rows = []
    for name, state in states.items():
        receipt = state.receipt
        rows.append(
            {
                "stage": name,
                "state": state.status.value,
                "fingerprint": (state.fingerprint or "-")[:12],
                "receipt": receipt.digest()[:12] if receipt else "-",
                "built from": ", ".join(
                    f"{used.stage} {used.receipt_sha256[:6]}" for used in (receipt.inputs if receipt else ())
                ),
                "seconds": round(total_seconds(receipt), 1) if receipt else "-",
                "dollars": round(receipt.dollars, 2) if receipt else "-",
                "code": (receipt.code_revision or "-")[:10] if receipt else "-",
                "where": _where(receipt) if receipt else "",
            }
        )
    return f"## Lineage\n\n{table(rows)}\n"


def total_seconds(receipt: Receipt) -> float:
    """Of all attempts at the stage, where they are told apart."""
    return sum(attempt.seconds for attempt in receipt.attempts) or receipt.seconds


def _where(receipt: Receipt) -> str:
    """The processor that did the work, as exactly as it is known."""
    return next((str(receipt.hardware[k]) for k in ("gpu", "cpu", "machine") if k in receipt.hardware), "")


def _data(states: Mapping[str, StageState]) -> str:
    rows = [
        {"stage": name, "data": data, "sha256": digest[:16]}
        for name, state in states.items()
        if state.receipt
        for data, digest in state.receipt.data.items()
    ]
    return f"## Data\n\n{table(rows)}\n"


def _settings(recipe: Recipe) -> str:
    rows = [
        {"section": section, "setting": name, "value": value}
        for section, values in recipe.to_json().items()
        if isinstance(values, dict)
        for name, value in values.items()
        if name != "mixture"
    ]
    lines = ["## Recipe", ""]
    for section in dict.fromkeys(row["section"] for row in rows):
        lines += [
            f"### {section}",
            "",
            table(
                [
                    {k: v for k, v in row.items() if k != "section"}
                    for row in rows
                    if row["section"] == section
                ]
            ),
            "",
        ]
    return "\n".join(lines)
