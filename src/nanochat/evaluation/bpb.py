"""Bits per byte: how well a model predicts text, whatever its vocabulary.

The sum of the targets' nats, over ln 2 and over the bytes that the targets stand for. Special
tokens stand for no byte and are left out of both sums. Unlike a loss in nats per token it compares
models of different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanochat.model.gpt import GPT


class TargetBatch(Protocol):
    """Rows of ids, the id after each, and which of those are judged (weight above 0); all BT."""

    @property
    def ids_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def weights_BT(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class ByteLoss:
    """Sums over the targets that count; those of several batches or ranks add up."""

    nats: float = 0.0
    bytes: float = 0
    tokens: float = 0

    def __add__(self, other: ByteLoss) -> ByteLoss:
        return ByteLoss(self.nats + other.nats, self.bytes + other.bytes, self.tokens + other.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Raises ValueError where no target counted."""
        if not self.bytes:
            raise ValueError("bits per byte of no text: the batches held no targets but special tokens")
        return self.nats / (math.log(2) * self.bytes)

    @property
    def nats_per_token(self) -> float:
        """The mean loss of the same targets. Raises ValueError where no target counted."""
        if not self.tokens:
            raise ValueError("the loss of no text: the batches held no targets but special tokens")
        return self.nats / self.tokens


@torch.no_grad()
def byte_loss(model: GPT, batches: Iterable[TargetBatch], token_bytes: npt.NDArray[np.integer]) -> ByteLoss:
    """Sums over `batches`, whose tensors may lie on any device.

    token_bytes: bytes of each id, shape (V,), 0 for special tokens.
    """
    bytes_V = torch.as_tensor(np.asarray(token_bytes, dtype=np.int64), device=model.device)
    total = ByteLoss()
    for batch in batches:
        targets_BT = batch.targets_BT.to(model.device)
        bytes_BT = bytes_V[targets_BT] * (batch.weights_BT.to(model.device) > 0)
        counted_BT = bytes_BT > 0
        nats = model.loss_sum(batch.ids_BT.to(model.device), targets_BT, counted_BT.float())
        total += ByteLoss(float(nats), int(bytes_BT.sum()), int(counted_BT.sum()))
    return total
