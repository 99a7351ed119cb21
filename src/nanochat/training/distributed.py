"""The processes of one training run, as torchrun's environment describes them; one is a world of its own."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# A collective waits this long for the slowest rank: the longest evaluation or upload between two.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Who this process is among the run's processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """First process of its machine: the one that fetches files."""
        return self.local_rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, message: str | None) -> str | None:
        """The first rank's `message` on every rank (collective)."""
        if self.size == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the other processes that torchrun started (gloo on a CPU, nccl on GPUs), leave at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank=rank, size=size, local_rank=local_rank)
    finally:
        dist.destroy_process_group()
