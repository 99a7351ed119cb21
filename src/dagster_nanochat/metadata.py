"""Metadata that people look at: receipts, curves and tables as Dagster shows them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import dagster as dg

from nanochat.export.curves import CURVE, receipt_curve_png
from nanochat.export.markdown import table
from nanochat.export.report import total_seconds
from nanochat.store import ObjectStore
from nanochat.store.receipts import Receipt


def live_metrics_key(model: str, stage: str) -> dg.AssetKey:
    """The external asset that shows a running stage's metrics."""
    return dg.AssetKey(["live_metrics", model, stage])


def metrics_table(metrics: Mapping[str, float]) -> str:
    return table([{"metric": name, "value": value} for name, value in sorted(metrics.items())])


def picture(png: bytes, alt: str) -> dg.MetadataValue:
    """An inline picture: Markdown with a data URI, which Dagster's page shows."""
    return dg.MetadataValue.md(f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})")


def receipt_metadata(store: ObjectStore, receipt: Receipt, *, model: str, reused: bool) -> dict[str, Any]:
    """What a stage's materialization shows."""
    curve = receipt_curve_png(store, receipt, f"{model} · {receipt.stage}")
    metadata: dict[str, Any] = {
        "reused": reused,
        "fingerprint": receipt.fingerprint[:12],
        "receipt": receipt.digest()[:12],
        "seconds": total_seconds(receipt),
        "dollars": receipt.dollars,
        "metrics": dg.MetadataValue.md(metrics_table(receipt.metrics)),
        "outputs": dg.MetadataValue.md(
            table(
                [
                    {"file": file.name, "bytes": file.size_bytes, "sha256": file.sha256[:16], "key": file.key}
                    for file in receipt.outputs
                ]
            )
        ),
        "store": store.url,
        **{name: value for name, value in receipt.metrics.items() if "/" not in name},
    }
    if curve:
        metadata["loss_curve"] = picture(curve, "loss curve")
    if len(receipt.attempts) > 1:
        metadata["attempt_costs"] = dg.MetadataValue.md(
            table([attempt.model_dump(mode="json") for attempt in receipt.attempts])
        )
    if receipt.samples:
        metadata["samples"] = dg.MetadataValue.md(table(receipt.samples))
    for name, rows in receipt.tables.items():
        if name == CURVE:  # the picture
            continue
        metadata[f"table_{name}" if name in metadata else name] = dg.MetadataValue.md(table(rows))
    if receipt.warnings:
        metadata["warnings"] = dg.MetadataValue.md("\n".join(f"- {warning}" for warning in receipt.warnings))
    if receipt.events_key:
        metadata["events"] = receipt.events_key
    return metadata
