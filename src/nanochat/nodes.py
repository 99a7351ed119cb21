"""Several machines that make one attempt together: which of them this is, and what they know of each other.

The first (rank 0) speaks for the attempt: it holds the lease, ships the events, commits the checkpoints and
writes the receipt. Each of the others keeps a report in the store, written again and again while it lives,
and looks at the attempt's lease. Whichever falls silent, the rest end.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterable, Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from nanochat.failures import Failure
from nanochat.store.documents import Document
from nanochat.store.leases import machine_name, read_lease, utc_now
from nanochat.store.objects import ObjectNotFound, ObjectStore

# Two leases long: a node that works writes a dozen times in it.
SILENT_S = 60.0
# How long the first and the others wait for each other to come up: as long as a large image takes to pull.
GATHER_S = 1200.0

RANK_ENV = "NODE_RANK"
COUNT_ENV = "NUM_NODES"
MASTER_ENV = ("MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """One of `count` machines. The first of them listens at master_addr:master_port."""

    rank: int
    count: int
    master_addr: str
    master_port: int

    @classmethod
    def of(cls, environment: Mapping[str, str], count: int) -> Node | None:
        """This machine's place among `count`; None for one that is alone. Raises ValueError where the
        environment does not tell, or tells of another number."""
        if count == 1:
            return None
        names = (RANK_ENV, COUNT_ENV, *MASTER_ENV)
        missing = [name for name in names if not environment.get(name)]
        if missing:
            raise ValueError(f"one of {count} machines, and its environment has no {', '.join(missing)}")
        if environment[COUNT_ENV] != str(count):
            raise ValueError(f"one of {environment[COUNT_ENV]} machines; {count} were asked for")
        rank, master_addr, master_port = (environment[name] for name in (RANK_ENV, *MASTER_ENV))
        return cls(rank=int(rank), count=count, master_addr=master_addr, master_port=int(master_port))

    def torchrun_options(self) -> list[str]:
        return [
            f"--nnodes={self.count}",
            f"--node-rank={self.rank}",
            f"--master-addr={self.master_addr}",
            f"--master-port={self.master_port}",
        ]


class Ending(BaseModel):
    """Why a machine's part in an attempt came to a bad end. at: when, in seconds since 1970 by its own
    clock; None where that is not known, and others' failures are taken for its consequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    failure: Failure
    message: str
    at: float | None = Field(default_factory=time.time)


def first_cause(endings: Iterable[Ending]) -> Ending | None:
    """What the others followed from: a machine's fault goes before what training said of it."""
    return min(
        endings,
        key=lambda ending: (ending.failure not in (Failure.LOST, Failure.NOT_READY), ending.at or 0.0),
        default=None,
    )


class NodeReport(Document):
    """`attempts/<token>/nodes/<rank>/report.json`. beat_at: when it was written, by the node's clock.
    over: its training has ended, `ending` says how where that was no good end."""

    schema_name: ClassVar[str] = "nanochat.node_report"
    host: str = Field(default_factory=machine_name)
    beat_at: datetime.datetime = Field(default_factory=utc_now)
    over: bool = False
    ending: Ending | None = None


def node_prefix(attempt_prefix: str, rank: int) -> str:
    return f"{attempt_prefix}/nodes/{rank}"


def report_key(attempt_prefix: str, rank: int) -> str:
    return f"{node_prefix(attempt_prefix, rank)}/report.json"


class _Pulse:
    """How long what somebody writes has been the same, by this machine's clock."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since = time.monotonic()

    def feel(self, now_written: object) -> None:
        if now_written != self._seen:
            self._seen, self._since = now_written, time.monotonic()

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._since


class OtherNodes:
    """What the first node knows of the others."""

    def __init__(self, store: ObjectStore, attempt_prefix: str, count: int) -> None:
        self._store = store
        self._keys = {rank: report_key(attempt_prefix, rank) for rank in range(1, count)}
        self._reports: dict[int, NodeReport] = {}
        self._pulses = {rank: _Pulse() for rank in self._keys}

    def look(self) -> None:
        """Raises StoreError."""
        for rank, key in self._keys.items():
            try:
                report = NodeReport.read(self._store, key)
            except ObjectNotFound:
                continue
            self._reports[rank] = report
            self._pulses[rank].feel(report.beat_at)

    @property
    def missing(self) -> list[int]:
        """Those that have not come up yet."""
        return [rank for rank in self._keys if rank not in self._reports]

    @property
    def settled(self) -> bool:
        """Whether each has ended, or will not say any more how."""
        return all(rank in self._reports and self._reports[rank].over for rank in self._keys) or any(
            ending.failure is Failure.LOST for ending in self._endings()
        )

    def ending(self) -> Ending | None:
        """Why the attempt cannot go on, as far as it is the others' doing."""
        return first_cause(self._endings())

    def _endings(self) -> Iterable[Ending]:
        for rank, report in self._reports.items():
            silent_s = self._pulses[rank].silent_s
            if report.ending is not None:
                said = f"node {rank} ({report.host}): {report.ending.message}"
                yield report.ending.model_copy(update={"message": said})
            elif not report.over and silent_s > SILENT_S:
                said = f"node {rank} ({report.host}) has not been heard of for {silent_s:.0f} s"
                yield Ending(failure=Failure.LOST, message=said, at=None)


class FirstNode:
    """What the others know of the first: the attempt's lease, which it takes over from the orchestrator and
    renews while it works."""

    def __init__(self, store: ObjectStore, lease_key: str, token: str) -> None:
        self._store, self._key, self._token = store, lease_key, token
        self._pulse = _Pulse()
        self._gave_up = False
        self.begun = False

    def look(self) -> None:
        """Raises StoreError."""
        lease = read_lease(self._store, self._key)
        if lease is None:
            return
        self._gave_up = lease.released or lease.token != self._token
        if not self._gave_up and lease.owner == "supervisor":
            self.begun = True
            self._pulse.feel(lease.expires_at)

    @property
    def gone(self) -> str | None:
        """Why there is nobody to work with any more; None where there is, or may be yet."""
        if self._gave_up:
            return "the first node has given the attempt up"
        patience_s = SILENT_S if self.begun else GATHER_S
        if self._pulse.silent_s > patience_s:
            return f"the first node has not been heard of for {self._pulse.silent_s:.0f} s"
        return None
