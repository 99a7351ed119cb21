"""Training shards that come to this machine from a hub while training has begun on the first ones."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from nanochat.data.hub import Patience, download_address, fetch_verified
from nanochat.data.staging import Stop, Stopped
from nanochat.store.receipts import FileRef

_AT_ONCE = 4
_POLL_S = 0.05
# Two minutes of pauses: a hub that is away for a moment must not end a training that is paid for.
_PATIENCE = Patience(attempts=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """A file of a hub and the place where it will appear, whole and verified, by a rename."""

    file: FileRef
    url: str
    place: Path

    def bring(self, stop: Stop) -> None:
        """Raises HubError naming the file, and Stopped."""
        if self.place.exists():
            return
        self.place.parent.mkdir(parents=True, exist_ok=True)
        staged = self.place.with_name(f".{self.place.name}.unverified")
        fetch_verified(
            lambda destination: download_address(self.url, destination, stop, patience=_PATIENCE),
            staged,
            size_bytes=self.file.size_bytes,
            sha256=self.file.sha256,
            what=f"shard {self.file.name} ({self.url})",
        )
        os.replace(staged, self.place)


class Arrivals:
    """Files that are on their way, in the order in which training reads them.

    One process of a machine fetches, several at a time; all of them wait for the file they need. A
    download that fails ends the training as soon as the fetching process opens another file.
    """

    def __init__(self, arrivals: Sequence[Arrival] = ()) -> None:
        self._arrivals = {arrival.place: arrival for arrival in arrivals}
        self._order = list(self._arrivals)
        self._lock = threading.Lock()
        self._stop = Stop()
        self._closed = False
        self._error: Exception | None = None

    def __len__(self) -> int:
        return len(self._arrivals)

    def fetch(self) -> None:
        """Begin to fetch, on threads of their own."""
        for number in range(min(_AT_ONCE, len(self._order))):
            threading.Thread(target=self._work, name=f"shard-{number}", daemon=True).start()

    def go_on_at(self, place: Path) -> None:
        """Fetch this one next, then those after it, then those before it."""
        with self._lock:
            places = [*self._arrivals]
            first = places.index(place) if place in places else 0
            self._order.sort(key=lambda waiting: places.index(waiting) < first)

    def wait_for(self, place: Path) -> Path:
        """`place`, when the file is there. One that is not among the arrivals is there already.

        Raises what a download has failed with, Stopped where nobody waits any more.
        """
        while place in self._arrivals:
            closed = self._closed
            if self._error is not None:
                raise self._error
            if place.exists():
                break
            if closed:
                raise Stopped
            time.sleep(_POLL_S)
        return place

    def close(self) -> None:
        """Give up what is still on its way."""
        self._closed = True
        self._stop.set()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._closed or not self._order:
                    return
                arrival = self._arrivals[self._order.pop(0)]
            try:
                arrival.bring(self._stop)
            except Stopped:
                return
            except Exception as error:  # raised by whoever waits
                self._error = error
                self.close()
                return
