"""What a stage supplies to the one trainer, and what it measures."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from nanochat.evaluation.bpb import ByteLoss, byte_loss
from nanochat.evaluation.multiple_choice import multiple_choice
from nanochat.inference.calculator import Calculator
from nanochat.inference.engine import Engine
from nanochat.model.gpt import GPT
from nanochat.recipes import Base, Midtrain, Sft
from nanochat.tokenizer import Tokenizer
from nanochat.training.batches import Loader, MicroBatch
from nanochat.training.distributed import World
from nanochat.training.inputs import Inputs
from nanochat.training.job import TrainingJob

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageContext:
    """What every stage works with. One a process."""

    job: TrainingJob
    inputs: Inputs
    tokenizer: Tokenizer
    world: World


@dataclasses.dataclass(kw_only=True)
class Findings:
    """What a finished stage has to tell."""

    metrics: Metrics = dataclasses.field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)


class Stage(ABC):
    """Data, rates and measurements of one stage. `prepare` first, then the rest.

    fixed_shapes: whether every training step has one shape, so that compiling it can pay.
    """

    fixed_shapes: ClassVar[bool]

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.job, self.inputs, self.tokenizer = context.job, context.inputs, context.tokenizer
        self.world, self.recipe = context.world, context.job.recipe

    @property
    @abstractmethod
    def section(self) -> Base | Midtrain | Sft:
        """The recipe's section of this stage."""

    @property
    @abstractmethod
    def batch_tokens(self) -> int:
        """Tokens of a global batch, padding included."""

    @abstractmethod
    def prepare(self) -> None:
        """Read and check what training and measuring need, so that nothing bad is found after it.

        Raises BadInput, and the errors of the files' readers, for data that cannot be used.
        """

    @property
    @abstractmethod
    def steps(self) -> int: ...

    @abstractmethod
    def make_loader(self, state: dict[str, Any] | None) -> Loader:
        """The training data from the beginning, or from a checkpoint's loader state on."""

    @abstractmethod
    def evaluate(self, model: GPT) -> Metrics:
        """Measured while training and at its end, on every rank (each its share)."""

    @abstractmethod
    def finish(self, model: GPT, findings: Findings) -> None:
        """Add what is measured once, at the end, by the first rank alone."""

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.integer]:
        return np.asarray(self.tokenizer.token_bytes())

    @contextmanager
    def engine(self, model: GPT) -> Iterator[Engine]:
        """An engine whose calculator ends with the block."""
        calculator = Calculator()
        try:
            yield Engine(model, self.tokenizer, calculator)
        finally:
            calculator.close()

    def bits_per_byte(self, model: GPT, batches: Iterator[MicroBatch]) -> Metrics:
        """Bits per byte and loss of all ranks' batches (collective)."""
        mine = byte_loss(model, batches, self.token_bytes)
        loss = ByteLoss(*self.world.sum_numbers([mine.nats, mine.bytes, mine.tokens]))
        return {"val_bpb": loss.bits_per_byte, "val_loss": loss.nats_per_token}

    def loss(self, model: GPT, batches: Iterator[MicroBatch]) -> float:
        """Mean nats per target over all ranks' batches (collective)."""
        nats = targets = 0.0
        for batch in batches:
            piece = batch.to(model.device)
            nats += float(model.loss_sum(piece.ids_BT, piece.targets_BT, piece.weights_BT))
            targets += float(batch.weights_BT.sum())
        nats, targets = self.world.sum_numbers([nats, targets])
        return nats / targets

    def accuracy(self, model: GPT, name: str, questions: list[Any]) -> Metrics:
        """Multiple choice over all ranks' share of the questions (collective)."""
        mine = multiple_choice(model, self.tokenizer, questions[self.world.rank :: self.world.size])
        correct, total, chance, skipped = self.world.sum_numbers(
            [mine.correct, mine.total, mine.chance * mine.total, mine.skipped]
        )
        return {
            f"{name}_accuracy": correct / max(total, 1),
            f"{name}_correct": correct,
            f"{name}_questions": total,
            f"{name}_chance": chance / max(total, 1),
            f"{name}_skipped": skipped,
        }


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Eval mode without gradients, and back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
