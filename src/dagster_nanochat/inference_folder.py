"""`checkpoint/<model>/`: what an inference image needs, and nothing else."""

from __future__ import annotations

import json

import dagster as dg

from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe
from dagster_nanochat.views import data_folder, show_files
from nanochat.store.receipts import current_receipt


def show_inference_folder(context: dg.AssetExecutionContext, store: StoreResource) -> None:
    """Weights, tokenizer and `checkpoint.json` (model, receipt, digests) of the fine-tuned model."""
    recipe = required_recipe(context)
    opened = store.open()
    receipt = current_receipt(opened, recipe.name, "sft")
    tokenizer = current_receipt(opened, recipe.name, "tokenizer")
    if receipt is None or tokenizer is None:
        return
    files = (
        receipt.output("model.safetensors"),
        receipt.output("model.json"),
        tokenizer.output("tokenizer.json"),
    )
    folder = show_files(opened, files, data_folder(opened).parent / "checkpoint" / recipe.name)
    document = {
        "schema": "nanochat.checkpoint",
        "version": 1,
        "model": recipe.name,
        "stage": "sft",
        "fingerprint": receipt.fingerprint,
        "receipt_sha256": receipt.digest(),
        "files": {file.name: {"bytes": file.size_bytes, "sha256": file.sha256} for file in files},
    }
    (folder / "checkpoint.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
