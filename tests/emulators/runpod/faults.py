"""Faults on demand: what goes wrong with which request or pod, how often and when."""

from __future__ import annotations

import itertools
import random
import re
import threading
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

RouteKind = Literal["status", "status_after", "hang", "hang_after", "slow", "extra_fields"]
PodKind = Literal[
    "pull_stuck", "pull_fails", "start_fails", "runtime_null", "dies", "vanishes", "freezes", "network"
]
Kind = Literal[RouteKind, PodKind, "no_capacity", "logs_hang", "lingers", "throttled", "rollout_stuck"]
ROUTE_KINDS: tuple[RouteKind, ...] = get_args(RouteKind)
POD_KINDS: tuple[PodKind, ...] = get_args(PodKind)


class Fault(BaseModel):
    """Of requests (`match` is a regular expression searched in ``METHOD /v2/path``):

    status         the answer is `status`, with `detail` and `headers`; nothing is done
    status_after   the request is done, then answered with `status`
    hang           nothing is done; the connection is held for `seconds`, then closed without an answer
    hang_after     the request is done, then the same
    slow           the request is done after `seconds`
    extra_fields   `fields` are added to the answer

    Of a pod that exists (`pod`: its id) or of the next that is created (`gpu`, `pod`: expressions
    searched in the GPU's id and in the pod's name); those in the second line come `after_s` later:

    pull_stuck, pull_fails, start_fails, runtime_null (for `seconds`)
    dies (with `state`), vanishes, freezes, network (it no longer reaches the S3 server)

    Others: no_capacity (`gpu`, `data_center`, `cloud` narrow it), logs_hang (a log stream goes silent
    after `lines`), lingers (a deleted pod runs on for `seconds`).

    A worker of an endpoint suffers what a pod does; `pod` is its id, or the endpoint's name for the next
    worker. It may be throttled, too (it gets no machine for `seconds`). rollout_stuck: workers of an older
    release are not replaced (`pod`: the endpoint's name) until the fault is cleared. Job requests meet the
    faults of requests; those of workers, with the key `pod`.

    times: how often, None until it is cleared. probability: of each time, drawn with `seed`.
    key: only requests with the account's key, or only those with a pod's own.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    match: str = ""
    key: Literal["account", "pod"] | None = None
    gpu: str = ""
    data_center: str | None = None
    cloud: Literal["SECURE", "COMMUNITY"] | None = None
    pod: str = ""
    times: int | None = Field(default=1, ge=0)
    probability: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    status: int = 500
    detail: str = "fault on demand"
    headers: dict[str, str] = Field(default_factory=dict)
    seconds: float = 30.0
    after_s: float = 0.0
    state: Literal["EXITED", "ERROR"] = "EXITED"
    fields: dict[str, Any] = Field(default_factory=lambda: {"addedLater": {"by": "the platform"}})
    lines: int = 0


class _Ordered:
    def __init__(self, id: str, fault: Fault) -> None:
        self.id = id
        self.fault = fault
        self.left = fault.times
        self.hits = 0
        self._random = random.Random(fault.seed)

    def meets(self, kinds: tuple[str, ...], facts: dict[str, str]) -> bool:
        fault = self.fault
        if fault.kind not in kinds or self.left == 0:
            return False
        if not all(re.search(getattr(fault, name), facts.get(name, "")) for name in ("match", "gpu", "pod")):
            return False
        exact = {name: getattr(fault, name) for name in ("key", "data_center", "cloud")}
        if any(wanted is not None and wanted != facts.get(name) for name, wanted in exact.items()):
            return False
        return fault.probability == 1.0 or self._random.random() < fault.probability

    def use(self) -> None:
        self.hits += 1
        if self.left is not None:
            self.left -= 1


class Faults:
    """The faults that were asked for. Safe to use from several threads."""

    def __init__(self) -> None:
        self._ordered: list[_Ordered] = []
        self._ids = itertools.count(1)
        self._lock = threading.Lock()

    def add(self, kind: Kind, **fields: Any) -> str:
        """Order a fault (see Fault); returns its id."""
        fault = Fault(kind=kind, **fields)
        with self._lock:
            ordered = _Ordered(f"fault-{next(self._ids)}", fault)
            self._ordered.append(ordered)
        return ordered.id

    def use(self, id: str) -> None:
        """Count a fault as one that has struck."""
        with self._lock:
            next(ordered for ordered in self._ordered if ordered.id == id).use()

    def clear(self, id: str | None = None) -> None:
        """Forget one fault, or all."""
        with self._lock:
            self._ordered = [ordered for ordered in self._ordered if id not in (None, ordered.id)]

    def hits(self, id: str) -> int:
        """How often a fault has struck."""
        with self._lock:
            return next(ordered.hits for ordered in self._ordered if ordered.id == id)

    def take(self, *kinds: Kind, **facts: str) -> Fault | None:
        """The first fault that meets these facts; it has one time less afterwards."""
        return self.take_for_all(*kinds, choices=[facts])[0]

    def take_for_all(self, *kinds: Kind, choices: list[dict[str, str]]) -> list[Fault | None]:
        """The fault that each choice meets. They are used up only where no choice is free of faults."""
        with self._lock:
            met = [
                next((ordered for ordered in self._ordered if ordered.meets(kinds, facts)), None)
                for facts in choices
            ]
            if None not in met:
                for ordered in dict.fromkeys(filter(None, met)):
                    ordered.use()
            return [ordered.fault if ordered else None for ordered in met]

    def take_every(self, *kinds: Kind, **facts: str) -> list[Fault]:
        """All faults that meet these facts."""
        with self._lock:
            met = [ordered for ordered in self._ordered if ordered.meets(kinds, facts)]
            for ordered in met:
                ordered.use()
            return [ordered.fault for ordered in met]

    def is_on(self, kind: Kind, **facts: str) -> bool:
        """Whether a fault meets these facts; it is not used up."""
        with self._lock:
            return any(ordered.meets((kind,), facts) for ordered in self._ordered)

    def listed(self) -> list[dict[str, Any]]:
        with self._lock:
            return [
                {"id": ordered.id, "hits": ordered.hits, "left": ordered.left, **ordered.fault.model_dump()}
                for ordered in self._ordered
            ]
