"""`checkpoint/<model>/`: what an inference image needs, and nothing else."""

from __future__ import annotations

import json

from dagster_nanochat.views import project_folder, show_files
from nanochat.recipes import Recipe
from nanochat.store import ObjectStore
from nanochat.store.receipts import current_receipt


def show_inference_folder(recipe: Recipe, store: ObjectStore) -> None:
    """Weights, tokenizer and `checkpoint.json` (model, receipt, digests) of the fine-tuned model."""
    receipt = current_receipt(store, recipe.name, "sft")
    tokenizer = current_receipt(store, recipe.name, "tokenizer")
    if receipt is None or tokenizer is None:
        return
    files = (
        receipt.output("model.safetensors"),
        receipt.output("model.json"),
        tokenizer.output("tokenizer.json"),
    )
    folder = show_files(store, files, project_folder(store) / "checkpoint" / recipe.name)
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
