"""Checkpoints: everything that a later step needs to be the same step, committed or not there at all.

`<prefix>/checkpoints/<training>/step_<8 digits>/` (see `checkpoint_folders`) holds

    model.safetensors       weights, fp32
    model.json              architecture, vocabulary, which tokenizer (`ModelCard`)
    optimizer.safetensors   optimizer state by name
    random.safetensors      states of the random number generators
    state.json              step, loader state, how it was trained (`TrainingState`)
    manifest.json           size and sha256 of all of these, written last

A checkpoint without a manifest, or that is not what its manifest says, is a torn upload: it is
passed over, never loaded. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.model.gpt import GPT
from nanochat.recipes import Model
from nanochat.store import ObjectStore
from nanochat.store.digests import digest_file
from nanochat.store.documents import Document
from nanochat.store.objects import ObjectNotFound
from nanochat.store.receipts import FileEntry, FileRef
from nanochat.training.checkpoint_folders import (
    MANIFEST,
    checkpoint_prefix,
    delete_checkpoint,
    list_checkpoints,
    training_prefix,
)
from nanochat.training.progress import Progress

MODEL_WEIGHTS = "model.safetensors"
MODEL_CARD = "model.json"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
STATE = "state.json"

# What a stage that goes on from this one needs of it, and what inference needs.
MODEL_FILES = (MODEL_WEIGHTS, MODEL_CARD)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which, and what is wrong with it."""


class ModelCard(Document):
    """`model.json`: what the weights beside it are."""

    schema_name: ClassVar[str] = "nanochat.model"

    model: Model
    vocab_size: int = Field(gt=0)
    tokenizer_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class AttemptWork(BaseModel):
    """What one attempt put into a training.

    tokens: trained on. seconds: that its processes ran, up to its last checkpoint. None: not kept
    (a state of version 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    token: str
    tokens: int | None = Field(default=None, ge=0)
    seconds: float | None = Field(default=None, ge=0)


class TrainingState(Document):
    """`state.json`: where training stood, and whose training it was.

    inputs: receipt digests of the upstream stages. attempts: those that have worked on it, the first
    begun from nothing. In version 1 they were tokens alone.
    """

    schema_name: ClassVar[str] = "nanochat.training_state"
    schema_version: ClassVar[int] = 2

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    attempts: tuple[AttemptWork, ...] = Field(min_length=1)
    steps: int = Field(gt=0)
    progress: Progress
    world_size: int = Field(ge=1)
    threads: int = Field(ge=1)
    device: str
    dtype: str
    compiled: bool

    @field_validator("attempts", mode="before")
    @classmethod
    def _tokens_alone(cls, attempts: Any) -> Any:
        if not isinstance(attempts, list | tuple):
            return attempts
        return [{"token": attempt} if isinstance(attempt, str) else attempt for attempt in attempts]


class Manifest(Document):
    """`manifest.json`: the commit mark."""

    schema_name: ClassVar[str] = "nanochat.checkpoint"

    step: int = Field(ge=0)
    files: tuple[FileEntry, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint in the store. `files`: the manifest last."""

    step: int
    prefix: str
    files: tuple[FileRef, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What goes into a checkpoint, copied out of the running training.

    Copying is the caller's part (`copy_to_cpu`): the tensors are written while training goes on.
    """

    card: ModelCard
    state: TrainingState
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that training cannot change any more."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def random_state() -> dict[str, Tensor]:
    """States of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class CheckpointWriter:
    """Commits the snapshots of one training to the store on a thread of its own, one at a time.

    The newest `keep` stay, older ones of the same training are dropped.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        training: str,
        work: Path,
        *,
        keep: int = 2,
        resumed: Checkpoint | None = None,
    ) -> None:
        """training: token of its first attempt. resumed: the checkpoint that it goes on from."""
        self._store, self._prefix, self._training = store, prefix, training
        self._work, self._keep = work, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._committed = [] if resumed is None else [resumed]

    def save(self, snapshot: Snapshot, on_commit: Callable[[Checkpoint], None]) -> None:
        """Start to commit; waits for the one before. Raises what that one raised."""
        self.wait()
        self._thread = threading.Thread(
            target=self._commit, args=(snapshot, on_commit), name="checkpoint-upload", daemon=False
        )
        self._thread.start()

    def wait(self) -> Checkpoint | None:
        """Wait for the commit under way; the last checkpoint committed. Raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._committed[-1] if self._committed else None

    def _commit(self, snapshot: Snapshot, on_commit: Callable[[Checkpoint], None]) -> None:
        try:
            checkpoint = self._write(snapshot)
            self._committed = [c for c in self._committed if c.step != checkpoint.step]
            self._committed = [*self._committed, checkpoint][-self._keep :]
            kept = {c.prefix for c in self._committed}
            for prefix in list_checkpoints(self._store, training_prefix(self._prefix, self._training)):
                # Later ones are torn: they are overwritten when training gets there.
                if prefix < checkpoint.prefix and prefix not in kept:
                    delete_checkpoint(self._store, prefix)
            on_commit(checkpoint)
        except BaseException as error:  # raised to the trainer by its next wait()
            self._error = error

    def _write(self, snapshot: Snapshot) -> Checkpoint:
        step = snapshot.state.progress.step
        folder = self._work / f"step_{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(dict(snapshot.weights), folder / MODEL_WEIGHTS)
        save_file(dict(snapshot.optimizer), folder / OPTIMIZER)
        save_file(dict(snapshot.random), folder / RANDOM)
        (folder / MODEL_CARD).write_bytes(snapshot.card.to_bytes())
        (folder / STATE).write_bytes(snapshot.state.to_bytes())
        entries = tuple(FileEntry.of(path) for path in sorted(folder.iterdir()))
        (folder / MANIFEST).write_bytes(Manifest(step=step, files=entries).to_bytes())
        manifest = FileEntry.of(folder / MANIFEST)
        prefix = checkpoint_prefix(self._prefix, self._training, step)
        # An older manifest must not vouch for a half-replaced folder.
        self._store.delete(f"{prefix}/{MANIFEST}")
        for entry in (*entries, manifest):
            self._store.put_file(f"{prefix}/{entry.name}", folder / entry.name, move=True)
        folder.rmdir()
        return _checkpoint(prefix, step, (*entries, manifest))


def _checkpoint(prefix: str, step: int, entries: tuple[FileEntry, ...]) -> Checkpoint:
    files = tuple(
        FileRef(key=f"{prefix}/{entry.name}", size_bytes=entry.size_bytes, sha256=entry.sha256)
        for entry in entries
    )
    return Checkpoint(step=step, prefix=prefix, files=files)


# --------------------------------------------------------------------------------------------------
# Reading


def find_newest(
    store: ObjectStore, prefix: str, work: Path, usable: Callable[[str, TrainingState], str | None]
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a stage that is complete, intact and `usable`, fetched to `local_folder`.

    usable: why this training may not go on from the checkpoint under that prefix, of that state
    (None: it may); asked before the large files are fetched. The second value has a sentence for
    each checkpoint that was passed over.
    """
    passed_over: list[str] = []
    for found in reversed(list_checkpoints(store, f"{prefix}/checkpoints")):
        try:
            manifest = _fetch_manifest(store, found, work)
            _fetch_files(store, found, work, manifest, [STATE])
            reason = usable(found, load_state(local_folder(work, found)))
            if reason is None:
                return fetch_checkpoint(store, found, work), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
            continue
        passed_over.append(f"checkpoint {found} {reason}")
    return None, passed_over


def local_folder(work: Path, prefix: str) -> Path:
    """Where the files of a checkpoint that was fetched are."""
    return work.joinpath("resume", *prefix.split("/")[-2:])


def fetch_checkpoint(store: ObjectStore, prefix: str, work: Path) -> Checkpoint:
    """Bring a checkpoint here and verify it against its manifest. Raises CheckpointError."""
    manifest = _fetch_manifest(store, prefix, work)
    _fetch_files(store, prefix, work, manifest, [entry.name for entry in manifest.files])
    return fetched_checkpoint(work, prefix)


def fetched_checkpoint(work: Path, prefix: str) -> Checkpoint:
    """A checkpoint that a process of this machine fetched and verified."""
    path = local_folder(work, prefix) / MANIFEST
    manifest = Manifest.from_bytes(path.read_bytes(), f"{prefix}/{MANIFEST}")
    return _checkpoint(prefix, manifest.step, (*manifest.files, FileEntry.of(path)))


def _fetch_manifest(store: ObjectStore, prefix: str, work: Path) -> Manifest:
    path = local_folder(work, prefix) / MANIFEST
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.fetch(f"{prefix}/{MANIFEST}", path)
    except ObjectNotFound as error:
        raise CheckpointError(f"checkpoint {prefix} has no manifest: it was never finished") from error
    try:
        manifest = Manifest.from_bytes(path.read_bytes(), f"{prefix}/{MANIFEST}")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {prefix}: {error}") from error
    missing = {MODEL_WEIGHTS, MODEL_CARD, OPTIMIZER, RANDOM, STATE} - {entry.name for entry in manifest.files}
    if not prefix.endswith(f"/step_{manifest.step:08d}"):
        raise CheckpointError(f"checkpoint {prefix}: its {MANIFEST} is of step {manifest.step}")
    if missing:
        raise CheckpointError(f"checkpoint {prefix}: its manifest lacks {', '.join(sorted(missing))}")
    return manifest


def _fetch_files(
    store: ObjectStore, prefix: str, work: Path, manifest: Manifest, names: Collection[str]
) -> None:
    for entry in manifest.files:
        if entry.name not in names:
            continue
        file = FileRef(key=f"{prefix}/{entry.name}", size_bytes=entry.size_bytes, sha256=entry.sha256)
        try:
            path = store.fetch(file.key, local_folder(work, prefix) / entry.name)
        except ObjectNotFound as error:
            raise CheckpointError(f"checkpoint {prefix} has lost its file {entry.name}") from error
        verify_file(path, file, store.url)


def verify_file(path: Path, file: FileRef, store_url: str) -> Path:
    """`path`, if it is what `file` says. Raises CheckpointError naming sizes or digests."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file.key} is missing from the store {store_url}") from error
    if size != file.size_bytes:
        raise CheckpointError(f"{file.key} is torn: it has {size} bytes, not the {file.size_bytes} recorded")
    digest = digest_file(path)
    if digest != file.sha256:
        raise CheckpointError(f"{file.key} is damaged: its sha256 is {digest}, not {file.sha256}")
    return path


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises CheckpointError naming the file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def load_state(folder: Path) -> TrainingState:
    """Raises CheckpointError naming the file."""
    path = folder / STATE
    try:
        return TrainingState.from_bytes(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no usable training state: {error}") from error


def load_card(folder: Path) -> ModelCard:
    """Raises CheckpointError naming the file."""
    path = folder / MODEL_CARD
    try:
        return ModelCard.from_bytes(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no usable model card: {error}") from error


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    expected: ModelCard | None = None,
) -> GPT:
    """The model of a folder with `model.safetensors` and `model.json`, ready to evaluate.

    dtype: cast the weights (None: fp32 as stored). expected: what it must be. Raises CheckpointError
    naming each field or tensor that differs.
    """
    folder = Path(folder)
    card = load_card(folder)
    if expected is not None:
        check_card(card, expected, str(folder))
    model = GPT(card.model, card.vocab_size)
    load_weights(model, load_tensors(folder / MODEL_WEIGHTS), str(folder / MODEL_WEIGHTS))
    return model.to(device=device, dtype=dtype).eval()


def check_card(card: ModelCard, expected: ModelCard, name: str) -> None:
    """Raises CheckpointError naming what differs."""
    found, wanted = dataclasses.asdict(card.model), dataclasses.asdict(expected.model)
    differences = [
        f"{field} is {found[field]}, not {wanted[field]}" for field in wanted if found[field] != wanted[field]
    ]
    if card.vocab_size != expected.vocab_size:
        differences.append(f"vocab_size is {card.vocab_size}, not {expected.vocab_size}")
    if card.tokenizer_sha256 != expected.tokenizer_sha256:
        differences.append(
            f"its tokenizer is {card.tokenizer_sha256[:12]}, not {expected.tokenizer_sha256[:12]}"
        )
    if differences:
        raise CheckpointError(f"checkpoint {name} is of another model: {'; '.join(differences)}")


@torch.no_grad()
def load_weights(model: GPT, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy weights into the model. Raises CheckpointError naming what is missing, unknown or misshapen."""
    own = dict(model.named_parameters())
    problems = [f"missing {key}" for key in own.keys() - tensors.keys()]
    problems += [f"unknown {key}" for key in tensors.keys() - own.keys()]
    problems += [
        f"{key} is {tensors[key].dtype} {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
        for key in own.keys() & tensors.keys()
        if tensors[key].shape != own[key].shape or not tensors[key].is_floating_point()
    ]
    if problems:
        raise CheckpointError(f"{name} does not fit the model: {'; '.join(sorted(problems)[:8])}")
    for key, parameter in own.items():
        parameter.copy_(tensors[key])
