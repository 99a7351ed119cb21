"""What a loader hands the trainer: one rank's part of a global batch, and where to go on after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model at once: ids, the id after each, and the weight of that target."""

    ids_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """On the device, without waiting for the copy where the host's memory allows."""
        if device.type == "cpu":
            return self
        moved = [
            (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
            for tensor in (self.ids_BT, self.targets_BT, self.weights_BT)
        ]
        return MicroBatch(*moved)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's rows of one global batch, in pieces of at most the device's batch size.

    tokens: real tokens (no padding) among this rank's inputs. state: the loader's state after it.
    """

    parts: tuple[MicroBatch, ...]
    tokens: int
    state: dict[str, Any]

    def targets(self) -> float:
        """The sum of the targets' weights."""
        return sum(float(part.weights_BT.sum()) for part in self.parts)


class Loader(Protocol):
    """Global batches without end. `state` of a batch, given to a new loader, goes on after it."""

    def next_batch(self) -> Batch: ...

    def epochs(self, state: dict[str, Any]) -> float:
        """Passes over the data that a state stands for."""
        ...

    def close(self) -> None: ...


def micro_batch(
    rows_BR: npt.NDArray[np.integer], weights_BR: npt.NDArray[np.bool_] | None = None
) -> MicroBatch:
    """Rows of T + 1 tokens, shifted against themselves. weights: of each token as a target (None: all 1)."""
    rows = torch.from_numpy(rows_BR.astype(np.int64))
    ids_BT, targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    if weights_BR is None:
        return MicroBatch(ids_BT, targets_BT, torch.ones(ids_BT.shape))
    return MicroBatch(ids_BT, targets_BT, torch.from_numpy(weights_BR[:, 1:].astype(np.float32)))


def slices(rows: int, at_once: int) -> Iterator[slice]:
    """`rows` rows in pieces of at most `at_once`."""
    return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))
