"""The launcher protocol: where a stage can run, at what price, and how it is started and ended."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from nanochat.recipes import Hardware
from nanochat.training.job import JobHardware, TrainingJob


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a stage needs of a machine."""

    gpus: int
    min_gpu_memory_gib: int

    @classmethod
    def of(cls, hardware: Hardware) -> Request:
        """What a recipe's hardware section asks for."""
        return cls(gpus=hardware.gpus, min_gpu_memory_gib=hardware.min_gpu_memory_gib)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """A machine that could be had: `flops_per_s` is what training gets out of it in all."""

    name: str
    price_usd_per_h: float
    flops_per_s: float

    def hours(self, flops: float) -> float:
        return flops / self.flops_per_s / 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """A machine that runs, or ran, the attempt `token`."""

    launcher: str
    token: str
    id: str
    url: str | None = None


class Launcher(Protocol):
    """See DESIGN: the same supervisor runs behind every implementation."""

    name: str

    def offers(self, request: Request) -> list[Offer]:
        """What can be had, cheapest to finish first."""
        ...

    def hardware(self, wanted: Hardware) -> JobHardware:
        """How a recipe's training runs on such a machine: processes, threads, rows at once."""
        ...

    def launch(self, job: TrainingJob, offer: Offer) -> Handle:
        """Start the job's attempt. Returns as soon as the machine is asked for."""
        ...

    def find(self, token: str, prefix: str) -> Handle | None:
        """The live machine of an attempt, or None."""
        ...

    def alive(self, handle: Handle) -> bool:
        """Whether the machine of the attempt still runs."""
        ...

    def last_words(self, handle: Handle) -> str:
        """What an ended machine left to say, outside of the event stream, once; may be empty."""
        ...

    def terminate(self, handle: Handle) -> None:
        """Return only when the machine is gone. Raises TimeoutError when it will not go."""
        ...
