"""Committing: the manifest is last, old ones go, what fails is raised, nothing but safetensors is read."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.model.gpt import GPT
from nanochat.recipes import Model
from nanochat.store import FileStore
from nanochat.store.documents import DocumentError
from nanochat.store.receipts import Receipt, missing_outputs, write_receipt
from nanochat.training import checkpoint as ckpt
from nanochat.training import checkpoint_folders as folders
from nanochat.training.checkpoint import (
    AttemptWork,
    CheckpointError,
    CheckpointWriter,
    ModelCard,
    Snapshot,
    TrainingState,
)
from nanochat.training.progress import Progress

PREFIX = "stages/base/abc"
STEP_5 = f"{PREFIX}/checkpoints/t/step_00000005"
CONFIG = Model(depth=1, width=8, heads=2, kv_heads=2, context=8)


def snapshot(step: int, filling: float = 0.0) -> Snapshot:
    model = GPT(CONFIG, 20)
    model.init_weights(0)
    weights = ckpt.copy_to_cpu(dict(model.named_parameters()))
    weights["lm_head.weight"].fill_(filling)
    return Snapshot(
        card=ModelCard(model=CONFIG, vocab_size=20, tokenizer_sha256="0" * 64),
        state=TrainingState(
            stage="base",
            fingerprint="f",
            inputs={},
            attempts=(AttemptWork(token="t"),),
            steps=100,
            progress=Progress(step=step, loader={"epoch": 0}),
            world_size=1,
            threads=1,
            device="cpu",
            dtype="float32",
            compiled=False,
        ),
        weights=weights,
        optimizer={"momentum": torch.ones(3)},
        random=ckpt.random_state(),
    )


def ignore(checkpoint: ckpt.Checkpoint) -> None:
    """Nobody needs to know."""


def anything(prefix: str, state: TrainingState) -> str | None:
    return None


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_what_is_saved_is_found_and_equal(store: FileStore, tmp_path: Path) -> None:
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    committed: list[int] = []
    writer.save(snapshot(5, filling=2.5), lambda checkpoint: committed.append(checkpoint.step))
    saved = writer.wait()
    assert committed == [5]
    found, passed_over = ckpt.find_newest(store, PREFIX, tmp_path, anything)
    assert found == saved
    assert passed_over == []
    folder = ckpt.local_folder(tmp_path, STEP_5)
    assert ckpt.load_state(folder).progress.loader == {"epoch": 0}
    assert torch.equal(ckpt.load_model(folder).lm_head.weight, torch.full((20, 8), 2.5))
    assert ckpt.load_tensors(folder / ckpt.OPTIMIZER)["momentum"].tolist() == [1, 1, 1]


def test_the_manifest_is_put_last_and_an_older_one_is_taken_away_first(
    store: FileStore, tmp_path: Path
) -> None:
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    writer.save(snapshot(5), ignore)
    writer.wait()
    seen: list[tuple[str, bool]] = []
    original = store.put_file

    def put_file(key: str, path: Path, *, move: bool = False) -> None:
        manifest = f"{STEP_5}/manifest.json"
        seen.append((key.rsplit("/", 1)[-1], store.head(manifest) is not None))
        original(key, path, move=move)

    store.put_file = put_file  # type: ignore[method-assign]
    writer.save(snapshot(5, filling=1.0), ignore)
    writer.wait()
    assert seen[-1] == ("manifest.json", False)
    assert len(seen) == 6
    assert not any(there for _, there in seen)


def steps_of(store: FileStore, training: str = "t") -> list[int]:
    found = folders.list_checkpoints(store, folders.training_prefix(PREFIX, training))
    return [int(prefix[-8:]) for prefix in found]


def test_the_two_newest_stay_and_a_torn_older_one_goes_and_other_trainings_are_left_alone(
    store: FileStore, tmp_path: Path
) -> None:
    store.put(f"{PREFIX}/checkpoints/t/step_00000003/model.safetensors", b"half")
    store.put(f"{PREFIX}/checkpoints/t/step_00000090/model.safetensors", b"torn, later")
    store.put(f"{PREFIX}/checkpoints/other/step_00000003/model.safetensors", b"of another training")
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    for step in (5, 10, 15):
        writer.save(snapshot(step), ignore)
    writer.wait()
    assert steps_of(store) == [10, 15, 90]
    assert steps_of(store, "other") == [3]


def test_the_checkpoint_that_was_resumed_from_stays_until_two_newer_ones_are_there(
    store: FileStore, tmp_path: Path
) -> None:
    first = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    first.save(snapshot(5), ignore)
    second = CheckpointWriter(store, PREFIX, "t", tmp_path / "work", resumed=first.wait())
    second.save(snapshot(10), ignore)
    second.wait()
    assert steps_of(store) == [5, 10]
    second.save(snapshot(15), ignore)
    second.wait()
    assert steps_of(store) == [10, 15]


def record(store: FileStore, token: str, checkpoint: ckpt.Checkpoint) -> None:
    receipt = Receipt(
        stage="base",
        stage_version=1,
        fingerprint="abc",
        token=token,
        created_at="2026-01-01T00:00:00Z",
        seconds=1.0,
        outputs=checkpoint.files,
    )
    write_receipt(store, receipt)


def test_of_finished_trainings_only_the_checkpoints_that_a_receipt_names_stay(
    store: FileStore, tmp_path: Path
) -> None:
    """A rebuild writes beside what it replaces, and both receipts can still be verified."""
    for training in ("old", "new"):
        writer = CheckpointWriter(store, PREFIX, training, tmp_path / "work")
        for step in (5, 10):
            writer.save(snapshot(step), ignore)
        record(store, training, writer.wait())
    store.put(f"{PREFIX}/checkpoints/given-up/step_00000007/state.json", b"{}")
    removed = folders.drop_leftovers(store, PREFIX)
    assert removed == [
        f"{PREFIX}/checkpoints/{name}"
        for name in ("new/step_00000005", "old/step_00000005", "given-up/step_00000007")
    ]
    assert (steps_of(store, "old"), steps_of(store, "new"), steps_of(store, "given-up")) == ([10], [10], [])
    for info in store.list(f"{PREFIX}/receipts/"):
        assert missing_outputs(store, Receipt.read(store, info.key)) == []


def test_nothing_is_dropped_where_a_receipt_cannot_be_read(store: FileStore, tmp_path: Path) -> None:
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    writer.save(snapshot(5), ignore)
    writer.wait()
    store.put(f"{PREFIX}/receipts/damaged.json", b"{")
    with pytest.raises(DocumentError, match=r"receipts/damaged\.json is not JSON"):
        folders.drop_leftovers(store, PREFIX)
    assert steps_of(store) == [5]


def test_cleaning_up_and_listing_load_no_torch() -> None:
    code = "import sys, nanochat.training.checkpoint_folders; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_that_may_not_be_used_is_not_fetched_in_full(store: FileStore, tmp_path: Path) -> None:
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    writer.save(snapshot(5), ignore)
    writer.wait()
    fetched: list[str] = []
    original = store.fetch

    def fetch(key: str, destination: Path) -> Path:
        fetched.append(key.rsplit("/", 1)[-1])
        return original(key, destination)

    store.fetch = fetch  # type: ignore[method-assign]
    found, passed_over = ckpt.find_newest(store, PREFIX, tmp_path, lambda prefix, state: "is not for us")
    assert found is None
    assert passed_over == [f"checkpoint {STEP_5} is not for us"]
    assert fetched == ["manifest.json", "state.json"]


def test_a_state_of_version_1_is_read_and_what_it_did_not_keep_is_unknown() -> None:
    document = snapshot(5).state.to_json()
    assert document["version"] == 2
    document |= {"version": 1, "attempts": ["first", "second"]}
    del document["progress"]["recent"]
    state = TrainingState.from_bytes(json.dumps(document).encode(), "state.json")
    assert state.attempts == (AttemptWork(token="first"), AttemptWork(token="second"))
    assert state.attempts[0].seconds is None


def test_an_upload_that_fails_is_raised_by_the_next_wait_and_leaves_no_manifest(
    store: FileStore, tmp_path: Path
) -> None:
    original = store.put_file

    def put_file(key: str, path: Path, *, move: bool = False) -> None:
        if key.endswith("optimizer.safetensors"):
            raise OSError("no space left on device")
        original(key, path, move=move)

    store.put_file = put_file  # type: ignore[method-assign]
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    writer.save(snapshot(5), ignore)
    with pytest.raises(OSError, match="no space left"):
        writer.wait()
    found, passed_over = ckpt.find_newest(store, PREFIX, tmp_path, anything)
    assert found is None
    assert "step_00000005 has no manifest: it was never finished" in passed_over[0]


def test_training_goes_on_while_a_checkpoint_is_written(store: FileStore, tmp_path: Path) -> None:
    gate, original = threading.Event(), store.put_file

    def put_file(key: str, path: Path, *, move: bool = False) -> None:
        assert gate.wait(10)
        original(key, path, move=move)

    store.put_file = put_file  # type: ignore[method-assign]
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    taken = snapshot(5, filling=1.0)
    writer.save(taken, ignore)  # returns though nothing can be written yet
    assert steps_of(store) == []
    gate.set()
    writer.wait()
    assert steps_of(store) == [5]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda text: text.replace('"version": 1', '"version": 9'),
            "schema version 9 of nanochat.checkpoint",
        ),
        (lambda text: text.replace("model.json", "../model.json"), "files.0.name"),
        (lambda text: text.replace('"step": 5', '"step": 6'), "its manifest.json is of step 6"),
        (
            lambda text: text.replace("optimizer.safetensors", "other.safetensors"),
            "lacks optimizer.safetensors",
        ),
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[" * 100_000, "is not JSON"),
    ],
    ids=["newer", "outside", "other step", "incomplete", "truncated", "hostile"],
)
def test_a_manifest_that_is_not_ours_is_refused_by_name(
    store: FileStore, tmp_path: Path, edit: Any, message: str
) -> None:
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    writer.save(snapshot(5), ignore)
    writer.wait()
    key = f"{STEP_5}/manifest.json"
    manifest = json.loads(store.get(key))
    del manifest["document_sha256"]
    store.put(key, edit(json.dumps(manifest)).encode())
    found, (sentence,) = ckpt.find_newest(store, PREFIX, tmp_path, anything)
    assert found is None
    assert message in sentence
    assert "step_00000005" in sentence


def test_weights_that_do_not_fit_are_named() -> None:
    model = GPT(CONFIG, 20)
    tensors = ckpt.copy_to_cpu(dict(model.named_parameters()))
    del tensors["wte.weight"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(21, 8)
    tensors["blocks.0.mlp.c_fc.weight"] = torch.zeros(32, 8, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        ckpt.load_weights(model, tensors, "model.safetensors")
    for part in (
        "missing wte.weight",
        "unknown extra.weight",
        "lm_head.weight is torch.float32 (21, 8), not (20, 8)",
        "blocks.0.mlp.c_fc.weight is torch.int64",
    ):
        assert part in str(error.value)


def test_a_card_of_another_model_says_each_difference() -> None:
    card = ModelCard(model=CONFIG, vocab_size=20, tokenizer_sha256="0" * 64)
    other = ModelCard(
        model=Model(depth=2, width=8, heads=2, kv_heads=1, context=8),
        vocab_size=21,
        tokenizer_sha256="1" * 64,
    )
    with pytest.raises(CheckpointError) as error:
        ckpt.check_card(card, other, "step_5")
    assert str(error.value) == (
        "checkpoint step_5 is of another model: depth is 1, not 2; kv_heads is 2, not 1; "
        "vocab_size is 20, not 21; its tokenizer is 000000000000, not 111111111111"
    )


def test_random_states_survive(store: FileStore, tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(10)
    writer = CheckpointWriter(store, PREFIX, "t", tmp_path / "work")
    writer.save(snapshot(5), ignore)
    expected = torch.rand(4)
    writer.wait()
    ckpt.find_newest(store, PREFIX, tmp_path, anything)
    ckpt.set_random_state(ckpt.load_tensors(ckpt.local_folder(tmp_path, STEP_5) / ckpt.RANDOM))
    assert torch.equal(torch.rand(4), expected)
