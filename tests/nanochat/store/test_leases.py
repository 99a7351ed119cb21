"""Leases: one holder at a time, taken over only when they have run out."""

from __future__ import annotations

import datetime

import pytest

from nanochat.store import FileStore
from nanochat.store.leases import LeaseHeld, LeaseKeeper, LeaseLost, read_lease


class Clock:
    def __init__(self) -> None:
        self.now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

    def __call__(self) -> datetime.datetime:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += datetime.timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def keeper(tmp_path, clock: Clock, token: str) -> LeaseKeeper:
    return LeaseKeeper(
        FileStore(tmp_path), "x/lease.json", token=token, owner=f"owner of {token}", ttl_s=30, clock=clock
    )


def test_a_live_lease_has_one_holder(tmp_path, clock: Clock) -> None:
    keeper(tmp_path, clock, "a").take()
    with pytest.raises(LeaseHeld, match="owner of a"):
        keeper(tmp_path, clock, "b").take()


def test_a_lease_that_ran_out_is_taken_and_its_old_holder_finds_out(tmp_path, clock: Clock) -> None:
    first = keeper(tmp_path, clock, "a")
    first.take()
    clock.pass_(31)
    keeper(tmp_path, clock, "b").take()
    with pytest.raises(LeaseLost):
        first.renew()


def test_a_renewed_lease_lives_on(tmp_path, clock: Clock) -> None:
    first = keeper(tmp_path, clock, "a")
    first.take()
    for _ in range(5):
        clock.pass_(20)
        first.renew()
    with pytest.raises(LeaseHeld):
        keeper(tmp_path, clock, "b").take()


def test_a_released_lease_is_free_at_once(tmp_path, clock: Clock) -> None:
    first = keeper(tmp_path, clock, "a")
    first.take()
    first.release()
    keeper(tmp_path, clock, "b").take()
    first.release()  # no longer ours: nothing happens
    found = read_lease(FileStore(tmp_path), "x/lease.json")
    assert found is not None
    assert (found.token, found.released) == ("b", False)


def test_the_same_token_takes_over_its_own_lease(tmp_path, clock: Clock) -> None:
    """The orchestrator takes it before launching; the supervisor it launches goes on with it."""
    keeper(tmp_path, clock, "a").take()
    keeper(tmp_path, clock, "a").take()


def elsewhere(tmp_path, clock: Clock, token: str, host: str, *, skew_s: float) -> LeaseKeeper:
    """A keeper on another machine, whose clock is ahead (or behind) of the real time."""
    skew = datetime.timedelta(seconds=skew_s)
    return LeaseKeeper(
        FileStore(tmp_path),
        "x/lease.json",
        token=token,
        owner=f"owner of {token}",
        ttl_s=30,
        clock=lambda: clock.now + skew,
        monotonic=lambda: clock.now.timestamp(),
        host=host,
    )


@pytest.mark.parametrize("skew_s", [-60, 0, 60])
def test_a_machine_whose_clock_is_wrong_takes_no_lease_that_is_renewed(
    tmp_path, clock: Clock, skew_s: float
) -> None:
    holder = elsewhere(tmp_path, clock, "a", "one", skew_s=0)
    taker = elsewhere(tmp_path, clock, "b", "two", skew_s=skew_s)
    holder.take()
    for _ in range(20):
        clock.pass_(5)
        with pytest.raises(LeaseHeld):
            taker.take()
        clock.pass_(5)
        holder.renew()


@pytest.mark.parametrize("skew_s", [-60, 0, 60])
def test_a_lease_that_nobody_renews_is_taken_after_its_time_whatever_the_clocks(
    tmp_path, clock: Clock, skew_s: float
) -> None:
    elsewhere(tmp_path, clock, "a", "one", skew_s=0).take()
    taker = elsewhere(tmp_path, clock, "b", "two", skew_s=skew_s)
    for _ in range(3):
        with pytest.raises(LeaseHeld):
            taker.take()
        clock.pass_(10)
    assert taker.take().token == "b"


def test_a_lease_of_yesterday_is_taken_at_once(tmp_path, clock: Clock) -> None:
    elsewhere(tmp_path, clock, "a", "one", skew_s=0).take()
    clock.pass_(86_400)
    assert elsewhere(tmp_path, clock, "b", "two", skew_s=-60).take().token == "b"
