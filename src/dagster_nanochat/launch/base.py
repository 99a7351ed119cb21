"""The launcher protocol: where a stage can run, at what price, and how it is started and ended."""

from __future__ import annotations

import dataclasses
import os
from typing import Protocol

from nanochat.failures import AttemptFailed, Failure
from nanochat.plan import StagePlan
from nanochat.recipes import Hardware
from nanochat.training.job import JobHardware, Rented, TrainingJob

THREADS_ENV = "NANOCHAT_THREADS"


def number_setting(name: str, *, default: int) -> int:
    """A number above 0 from the environment. Raises AttemptFailed for what is none."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit() or int(text) == 0:
        raise AttemptFailed(
            Failure.BAD_REQUEST, f"{name}={text!r} is not a number above 0; unset it for {default}"
        )
    return int(text)


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
    """A machine that could be had: `flops_per_s` is what training gets out of it in all, `start_h` what
    passes, and is paid for, before it trains."""

    name: str
    price_usd_per_h: float
    flops_per_s: float
    start_h: float = 0.0

    def hours(self, flops: float) -> float:
        return self.start_h + flops / self.flops_per_s / 3600

    def dollars(self, flops: float) -> float:
        return self.hours(flops) * self.price_usd_per_h

    def priced(self, work: StagePlan) -> StagePlan:
        """The plan with what it takes on this machine."""
        if work.flops is None:
            return work
        return work.model_copy(update={"hours": self.hours(work.flops), "dollars": self.dollars(work.flops)})

    def row(self, flops: float | None) -> dict[str, str | float | None]:
        """As a line of a table: what `flops` would take."""
        return {
            "offer": self.name,
            "usd_per_h": self.price_usd_per_h,
            "hours": None if flops is None else self.hours(flops),
            "usd": None if flops is None else self.dollars(flops),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """A machine that runs, or ran, the attempt `token`."""

    launcher: str
    token: str
    id: str
    url: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a rented machine is waited for, in seconds: until its supervisor has taken the lease
    (`ready_s`), and between two renewals of it (`silent_s`). capacity_s: how long it is asked for again
    where there is none."""

    ready_s: float
    silent_s: float
    capacity_s: float


class Launcher(Protocol):
    """See DESIGN: the same supervisor runs behind every implementation."""

    name: str
    # Machines that may be tried for one stage before its failure to come up, or its loss, is final.
    max_machines: int
    # None: one's own machine, whose process is looked at instead.
    patience: Patience | None

    def offers(self, request: Request, flops: float | None = None) -> list[Offer]:
        """What can be had, cheapest to finish `flops` first. Raises AttemptFailed where there is nothing."""
        ...

    def hardware(self, wanted: Hardware, offer: Offer) -> JobHardware:
        """How a recipe's training runs on such a machine: processes, threads, rows at once."""
        ...

    def slots(self) -> list[str]:
        """Keys of the leases of which a run holds one while it trains: how many stages run at once."""
        ...

    def rent(self, offer: Offer, max_usd: float) -> Rented | None:
        """What a job on that offer is told of its price and its promise; None on one's own machine."""
        ...

    def image(self) -> str | None:
        """The image that a machine runs, by digest; None on one's own machine. Raises AttemptFailed."""
        ...

    def launch(self, job: TrainingJob, offer: Offer) -> Handle:
        """Start the job's attempt. Returns as soon as the machine is asked for. Raises AttemptFailed
        (NO_CAPACITY: another offer may do) with no machine left behind."""
        ...

    def find(self, prefix: str) -> Handle | None:
        """The live machine of an attempt at the stage under that prefix which is not over, or None."""
        ...

    def alive(self, handle: Handle) -> bool:
        """Whether the machine of the attempt still runs, as far as is known."""
        ...

    def trouble(self, handle: Handle) -> str | None:
        """Why a machine that has not come up yet never will; None where nothing says so."""
        ...

    def last_words(self, handle: Handle) -> str:
        """What an ended machine left to say, outside of the event stream, once; may be empty."""
        ...

    def terminate(self, handle: Handle, outcome: str = "") -> None:
        """Return only when the machine is gone. Raises TimeoutError when it will not go."""
        ...
