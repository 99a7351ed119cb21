"""The supervisor of every node but the first: trains with it, and tells it how that goes.

It holds no lease, writes no receipt, and knows of no deadline, budget or watch: the first node does, and
whatever ends its training ends theirs. Its output is kept in `attempts/<token>/nodes/<rank>/events.jsonl`.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

from nanochat.failures import Failure
from nanochat.nodes import Ending, FirstNode, Node, NodeReport, node_prefix, report_key
from nanochat.store import ObjectStore, StoreError
from nanochat.supervisor import EventShipper, Supervisor, told, work_folder
from nanochat.training.job import TrainingJob

_LOOK_EVERY_S = 5.0


class Follower(Supervisor):
    """One node's part in an attempt. `run()` returns the exit code: 0 after a good end."""

    def __init__(self, store: ObjectStore, job: TrainingJob, work: Path, node: Node) -> None:
        super().__init__(store, job, work, node)
        self._renew_at = time.monotonic()
        self._first = FirstNode(store, f"{job.prefix}/lease.json", job.token)
        self._report_key = report_key(job.attempt_prefix, node.rank)
        self._shipper = EventShipper(
            store, f"{node_prefix(job.attempt_prefix, node.rank)}/events.jsonl", self._spool
        )

    def run(self) -> int:
        return self._run(time.monotonic())

    def _train(self, started: float) -> Ending | None:
        return self._wait_for_first_node() or super()._train(started)

    def _wait_for_first_node(self) -> Ending | None:
        while not self._first.begun:
            self._keep_up_if_possible()
            ending = self._reason_to_stop(0.0)
            if ending is not None:
                return ending
            self._pause()
        return None

    def _watch_over(self, process: subprocess.Popen[str], started: float) -> Ending | None:
        try:
            return super()._watch_over(process, started)
        except StoreError as error:
            return Ending(failure=Failure.LOST, message=f"the store cannot be reached: {error}")

    def _look_around(self) -> None:
        self._store.put(self._report_key, NodeReport().to_bytes())
        self._first.look()

    def _reason_to_stop(self, elapsed_s: float) -> Ending | None:
        if self._signalled:
            return Ending(failure=Failure.CANCELLED, message=f"asked to stop by {self._signalled}")
        gone = self._first.gone
        return Ending(failure=Failure.LOST, message=gone) if gone else None

    def _record(self, started: float) -> Ending | None:
        return None

    def _conclude(self, ending: Ending | None) -> None:
        with told():
            self._store.put(self._report_key, NodeReport(over=True, ending=ending).to_bytes())
        super()._conclude(ending)


def follow(store: ObjectStore, job: TrainingJob, node: Node) -> int:
    """Take part in the job's attempt. The exit code: 0 after a good end, else 1."""
    with work_folder(job) as work:
        return Follower(store, job, work, node).run()


def wait_for_the_end(store: ObjectStore, job: TrainingJob) -> None:
    """Until the first node has ended the attempt: who ends a machine of several may end them all."""
    first = FirstNode(store, f"{job.prefix}/lease.json", job.token)
    while first.gone is None:
        with contextlib.suppress(StoreError):  # nothing seen is nothing heard
            first.look()
        time.sleep(_LOOK_EVERY_S)
