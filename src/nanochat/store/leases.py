"""Leases: one owner at a time, found out by whoever asks, given back by time.

A lease is a document with an expiry, written by compare-and-swap only. Whoever holds it renews it;
whoever finds it expired may take it. Expiry is told by the holder's clock, and the clocks of two
machines differ: a lease of another machine counts as expired only where it has not changed for its
whole time while the taker looked on, by the taker's own clock, or where it ran out longer ago than
clocks are ever wrong.

`lease.json` belongs to the attempt (while it lives there is
no twin), `watch.json` to the orchestrator that looks on, and slots (`slots/…`) limit how many
stages a machine runs at once.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import ClassVar

from pydantic import Field

from nanochat.store.documents import Document
from nanochat.store.objects import ObjectStore, PreconditionFailed

Clock = Callable[[], datetime.datetime]

# No machine that talks to S3 is this wrong: it is refused from 15 minutes on (RequestTimeTooSkewed).
_CLOCKS_DIFFER_AT_MOST = datetime.timedelta(minutes=15)


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def machine_name() -> str:
    """The name of this machine as leases and slots show it."""
    return socket.gethostname()


class Lease(Document):
    """Who works (or watches), since when, and until when without a renewal."""

    schema_name: ClassVar[str] = "nanochat.lease"

    token: str
    owner: str
    host: str = Field(default_factory=machine_name)
    pid: int = Field(default_factory=os.getpid)
    url: str | None = None
    taken_at: datetime.datetime
    expires_at: datetime.datetime
    ttl_s: float = 30.0
    released: bool = False

    def live(self, now: datetime.datetime) -> bool:
        return not self.released and now < self.expires_at

    def describe(self) -> str:
        return f"{self.owner} on {self.host} (pid {self.pid}, since {self.taken_at:%Y-%m-%d %H:%M:%S} UTC)"


class LeaseHeld(Exception):
    """Somebody else holds the lease; `lease` says who."""

    def __init__(self, key: str, lease: Lease) -> None:
        super().__init__(f"{key} is held by {lease.describe()}")
        self.lease = lease


class LeaseLost(Exception):
    """The lease that was held belongs to somebody else now: stop working."""


class LeaseKeeper:
    """Takes, renews and gives back one lease under `key` for one `token`."""

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        token: str,
        owner: str,
        ttl_s: float,
        url: str | None = None,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        host: str | None = None,
    ) -> None:
        self._store = store
        self._key = key
        self._token = token
        self._owner = owner
        self._ttl = datetime.timedelta(seconds=ttl_s)
        self._url = url
        self._clock = clock
        self._monotonic = monotonic
        self._host = host or machine_name()
        # The lease of somebody else that was seen last, and since when it has been the same.
        self._seen: tuple[str, float] | None = None

    def take(self) -> Lease:
        """Take a free or expired lease, or take over one of the same token. Raises LeaseHeld.

        Of another machine's lease it is found out by asking again for as long as the lease's time.
        """
        while True:
            found = Lease.read_with_etag(self._store, self._key)
            now = self._clock()
            if found and found[0].token != self._token and not self._is_over(found[0], found[1], now):
                raise LeaseHeld(self._key, found[0])
            mine = found and found[0].token == self._token
            lease = Lease(
                token=self._token,
                owner=self._owner,
                url=self._url,
                host=self._host,
                taken_at=found[0].taken_at if found and mine else now,
                expires_at=now + self._ttl,
                ttl_s=self._ttl.total_seconds(),
            )
            if self._swap(lease, found[1] if found else None):
                return lease

    def _is_over(self, lease: Lease, etag: str, now: datetime.datetime) -> bool:
        if lease.released or now >= lease.expires_at + _CLOCKS_DIFFER_AT_MOST:
            return True
        if lease.host == self._host:
            return not lease.live(now)
        if self._seen is None or self._seen[0] != etag:
            self._seen = (etag, self._monotonic())
        return self._monotonic() - self._seen[1] >= lease.ttl_s

    def renew(self) -> None:
        """Push the expiry forward. Raises LeaseLost when another token holds it."""
        while True:
            found = Lease.read_with_etag(self._store, self._key)
            if found is None or found[0].token != self._token or found[0].released:
                raise LeaseLost(f"{self._key} is no longer held by {self._token}")
            renewed = found[0].model_copy(update={"expires_at": self._clock() + self._ttl})
            if self._swap(renewed, found[1]):
                return

    def release(self) -> None:
        """Give it back; not holding it any more is fine."""
        while True:
            found = Lease.read_with_etag(self._store, self._key)
            if found is None or found[0].token != self._token or found[0].released:
                return
            if self._swap(found[0].model_copy(update={"released": True}), found[1]):
                return

    def _swap(self, lease: Lease, etag: str | None) -> bool:
        try:
            if etag is None:
                self._store.put(self._key, lease.to_bytes(), if_absent=True)
            else:
                self._store.put(self._key, lease.to_bytes(), if_match=etag)
        except PreconditionFailed:
            return False
        return True


def read_lease(store: ObjectStore, key: str) -> Lease | None:
    found = Lease.read_with_etag(store, key)
    return found[0] if found else None


def new_token() -> str:
    """A name for an attempt that nobody else has: when it was made, and chance."""
    return f"{utc_now():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
