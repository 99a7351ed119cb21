"""The processes of one training run, as torchrun's environment describes them; one is a world of its own."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# A collective waits this long for the slowest rank: the longest evaluation or upload between two.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=1)

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Who this process is among the run's processes. device: its own, which collectives run on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """First process of its machine: the one that fetches files."""
        return self.local_rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of this process's device over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all processes, in double precision; the same on all of them."""
        if self.size == 1:
            return [float(number) for number in numbers]
        sums: list[float] = self.sum_(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()
        return sums

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
        yield World(device=device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        # Before any collective: NCCL would take every process for one of the first GPU.
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank=rank, size=size, local_rank=local_rank, device=device)
    finally:
        dist.destroy_process_group()
