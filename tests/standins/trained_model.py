"""A tiny model that was really trained, on four texts, and a store that holds it as a built stage."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanochat.model.gpt import GPT
from nanochat.recipes import Model
from nanochat.store import ObjectStore, open_store
from nanochat.store.digests import digest_bytes, digest_file
from nanochat.store.receipts import FileRef, InputRef, Receipt, current_receipt, point, write_receipt
from nanochat.tokenizer import Tokenizer
from nanochat.training.checkpoint import MODEL_CARD, MODEL_WEIGHTS, ModelCard

_CALL = "<|python_start|>{}<|python_end|><|output_start|>{}<|output_end|>{}"

TRAINED = (
    *(
        f"<|bos|><|user_start|>{question}<|user_end|><|assistant_start|>{answer}<|assistant_end|>"
        for question, answer in (
            ("What is your name?", "I am NanoChat 😀."),
            ("What is 17+25?", _CALL.format("17+25", "42", "The answer is 42.")),
            ("What is 1/0?", _CALL.format("1/0", "error", "I cannot say.")),
        )
    ),
    "<|bos|>Once upon a time there was a model.<|bos|>",
)


def train(tokenizer: Tokenizer, spell: Callable[[str], list[int]]) -> GPT:
    """Knows the texts of TRAINED by heart (some hundred AdamW steps of a two-layer model)."""
    torch.manual_seed(0)
    config = Model(depth=2, width=48, heads=2, kv_heads=1, context=96)
    model = GPT(config, tokenizer.vocab_size)
    model.init_weights(0)
    rows = [spell(text) for text in TRAINED]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    weights = torch.tensor([[1.0] * (len(row) - 1) + [0.0] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = model.loss_sum(padded[:, :-1], padded[:, 1:], weights) / weights.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.06:
            break
    return model.eval()


def endless(model: GPT, tokenizer: Tokenizer, context: int = 30_000) -> GPT:
    """The same weights, but nothing ever ends an answer, and the context is long."""
    longer = GPT(dataclasses.replace(model.config, context=context), model.vocab_size)
    longer.load_state_dict(model.state_dict())
    for name in ("<|assistant_end|>", "<|bos|>"):
        longer.lm_head.weight.data[tokenizer.special(name)] = 0
    return longer


def put_receipt(
    store: ObjectStore, model: str, stage: str, files: list[Path], inputs: tuple[InputRef, ...]
) -> Receipt:
    """Store files as a stage's outputs, and its receipt, and point the model to it."""
    fingerprint = digest_bytes(stage.encode())
    outputs = []
    for path in files:
        key = f"stages/{stage}/{fingerprint[:12]}/output/{path.name}"
        store.put_file(key, path)
        outputs.append(FileRef(key=key, size_bytes=path.stat().st_size, sha256=digest_file(path)))
    receipt = Receipt(
        stage=stage,
        stage_version=1,
        fingerprint=fingerprint,
        token="t1",
        created_at=datetime.datetime.now(datetime.UTC),
        seconds=1.0,
        inputs=inputs,
        outputs=tuple(outputs),
    )
    write_receipt(store, receipt)
    point(store, model, stage, fingerprint)
    return receipt


def fill_store(folder: Path, trained_model: GPT, tokenizer: Tokenizer) -> ObjectStore:
    """A store in which model `quick` has its tokenizer, `base` and `sft`, but no `midtrain`."""
    store = open_store(str(folder / "store"))
    tokenizer.save(folder / "tokenizer.json")
    receipt = put_receipt(store, "quick", "tokenizer", [folder / "tokenizer.json"], ())
    card = ModelCard(
        model=trained_model.config,
        vocab_size=trained_model.vocab_size,
        tokenizer_sha256=digest_file(folder / "tokenizer.json"),
    )
    (folder / MODEL_CARD).write_bytes(card.to_bytes())
    save_file(
        {name: tensor.detach() for name, tensor in trained_model.named_parameters()}, folder / MODEL_WEIGHTS
    )
    inputs = (InputRef(stage="tokenizer", fingerprint=receipt.fingerprint, receipt_sha256=receipt.digest()),)
    for stage in ("base", "sft"):
        put_receipt(store, "quick", stage, [folder / MODEL_WEIGHTS, folder / MODEL_CARD], inputs)
    return store


def bake(store: ObjectStore, folder: Path) -> None:
    """`checkpoint/quick/` of a filled store."""
    receipt = current_receipt(store, "quick", "sft")
    tokenizer = current_receipt(store, "quick", "tokenizer")
    assert receipt is not None
    assert tokenizer is not None
    files = (receipt.output(MODEL_WEIGHTS), receipt.output(MODEL_CARD), tokenizer.output("tokenizer.json"))
    folder.mkdir(parents=True)
    for file in files:
        store.fetch(file.key, folder / file.name)
    document = {
        "schema": "nanochat.checkpoint",
        "version": 1,
        "model": "quick",
        "stage": "sft",
        "fingerprint": receipt.fingerprint,
        "receipt_sha256": receipt.digest(),
        "files": {file.name: {"bytes": file.size_bytes, "sha256": file.sha256} for file in files},
    }
    (folder / "checkpoint.json").write_text(json.dumps(document), encoding="utf-8")
