"""Leases as a Dagster run holds them: renewed by a thread, waited for aloud, given up on Terminate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

import dagster as dg

from dagster_nanochat.launch.base import Handle
from nanochat.store import StoreError
from nanochat.store.leases import Lease, LeaseHeld, LeaseKeeper, LeaseLost

HELD_TTL_S = 30.0


class HeldLease:
    """A lease that was taken: renewed by a thread, whatever its holder waits for, and given back
    (`release`) or left to whoever renews it from then on."""

    def __init__(self, keeper: LeaseKeeper, *, release: bool = True) -> None:
        self._keeper = keeper
        self._release = release
        self._end = threading.Event()
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._release:
            self._keeper.release()

    def check(self) -> None:
        """Raises LeaseLost where somebody else has it by now."""
        if self._lost:
            raise self._lost

    def _renew(self) -> None:
        while not self._end.wait(HELD_TTL_S / 4):
            try:
                self._keeper.renew()
            except LeaseLost as error:
                self._lost = error
                return
            except (StoreError, OSError, ValueError):
                continue  # there is time to try again before it expires


def wait_for_lease(
    context: dg.AssetExecutionContext, keepers: Sequence[LeaseKeeper], waits: Callable[[Lease], str]
) -> HeldLease:
    """Take the first of several leases that is free, saying meanwhile what `waits` makes of who has one.

    Raises DagsterExecutionInterruptedError when the run is terminated.
    """
    said: str | None = None
    while True:
        for keeper in keepers:
            try:
                keeper.take()
                return HeldLease(keeper)
            except LeaseHeld as held:
                holder = held.lease
        if said != holder.token:
            said = holder.token
            context.log.info(waits(holder))
        raise_if_cancelled(context)
        time.sleep(1.0)


class StillAlive(Exception):
    """The lease that was looked at has been renewed; `lease` says by whom."""

    def __init__(self, lease: Lease) -> None:
        super().__init__(lease.describe())
        self.lease = lease


def take_if_silent(
    context: dg.AssetExecutionContext,
    keeper: LeaseKeeper,
    what: str,
    find: Callable[[], Handle | None] = lambda: None,
) -> Handle | None:
    """Take a lease whose holder does not renew it any more, which may need looking at for its time.

    Returns None with the lease, or what `find` finds of the machine of who holds it. Raises StillAlive
    where it is renewed meanwhile, DagsterExecutionInterruptedError when the run is terminated.
    """
    seen: Lease | None = None
    while True:
        try:
            keeper.take()
            return None
        except LeaseHeld as held:
            handle = find()
            if handle is not None:
                return handle
            if seen is None:
                seen = held.lease
                context.log.info(
                    f"{what} waits: {seen.describe()} may be gone; unless it renews its lease, this run "
                    f"goes on in {seen.ttl_s:.0f} s at most"
                )
            elif held.lease != seen:
                raise StillAlive(held.lease) from None
            raise_if_cancelled(context)
            time.sleep(1.0)


def raise_if_cancelled(context: dg.AssetExecutionContext) -> None:
    """Dagster cannot interrupt a run that a foreground command executes, so its status is polled.

    What is raised then is what Dagster raises where it can: the run ends as cancelled, not as failed.
    """
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED):
        raise dg.DagsterExecutionInterruptedError("the run was terminated")


def pause_unless_cancelled(context: dg.AssetExecutionContext, seconds: float) -> None:
    """Raises as `raise_if_cancelled` does, soon after the run is terminated."""
    end = time.monotonic() + seconds
    while True:
        raise_if_cancelled(context)
        left_s = end - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(left_s, 1.0))
