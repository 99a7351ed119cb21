"""A worker of an endpoint: a machine that is waited for, and a container on it that is started again
whenever it ends."""

from __future__ import annotations

import dataclasses
import datetime
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from emulators.runpod.catalog import Gpu
from emulators.runpod.faults import Fault
from emulators.runpod.logs import PodLogs, timestamp
from emulators.runpod.ports import free_port
from emulators.runpod.processes import Container, StartFailed
from emulators.runpod.settings import Settings

_TICK_S = 0.02
# Failures of the container, one after the other, before the worker counts as unhealthy.
_FAILURES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerTruth:
    """What is so, whatever the API says. process_ids: of every start of its container."""

    id: str
    endpoint: str
    version: int
    image: str
    status: str
    gpu: str | None
    env: dict[str, str]
    folder: Path
    process_ids: tuple[int, ...]
    living_process_ids: tuple[int, ...]
    charged_usd: float
    is_there: bool


class Host(Protocol):
    """What a worker needs of the platform around it."""

    settings: Settings

    def has_image(self, reference: str) -> bool: ...

    def container(
        self, id: str, request: Mapping[str, Any], folder: Path, own: Mapping[str, str]
    ) -> tuple[Sequence[str], Mapping[str, str]]:
        """Command and environment. Raises StartFailed."""
        ...

    def place(self, request: Mapping[str, Any]) -> tuple[Gpu | None, str] | None:
        """A GPU type (None: a CPU) and a data center; None where nothing is free."""
        ...

    def give_back(self, request: Mapping[str, Any], gpu: Gpu | None, data_center: str) -> None: ...

    def remove_container(self, id: str, reference: str) -> None: ...

    def cut_off(self, id: str) -> None: ...

    def worker_environment(self, worker: Worker) -> Mapping[str, str]: ...

    def report(self, mistake: str) -> None:
        """Of the emulator's own."""
        ...


class Worker:
    """request: the endpoint's, as it was when the worker was made. on_lost: its jobs are nobody's."""

    def __init__(
        self,
        host: Host,
        *,
        id: str,
        endpoint: str,
        version: int,
        request: dict[str, Any],
        price_usd_per_h: Callable[[Gpu | None], float],
        folder: Path,
        faults: Sequence[Fault],
        on_lost: Callable[[], None],
    ) -> None:
        self.id = id
        self.endpoint = endpoint
        self.version = version
        self.request = request
        self.port = free_port()
        self.key = f"rpa_{secrets.token_hex(16).upper()}"
        self.folder = folder
        self.folder.mkdir(parents=True)
        self.logs = PodLogs()
        self.started_at: datetime.datetime | None = None
        self.is_ready = False
        self.is_unhealthy = False
        self.is_there = True
        self.idle_since = self.heard = time.monotonic()
        self.gpu: Gpu | None = None
        self.data_center: str | None = None
        self._host = host
        self._price_usd_per_h = price_usd_per_h
        self._on_lost = on_lost
        self._throttled_until = 0.0
        self._pull_stuck = self._pull_fails = self._start_fails = False
        self._strikes: list[tuple[float, Callable[[], None]]] = []
        self._container: Container | None = None
        self._process_ids: list[int] = []
        self._placed: float | None = None
        self._ended: float | None = None
        self._stopping = threading.Event()
        self._grace_s = host.settings.stop_grace_s
        self._thread = threading.Thread(target=self._run, name=f"worker-{id}", daemon=True)
        for fault in faults:
            self.suffer(fault)

    # -- what the endpoint and the faults ask for --------------------------------------------------

    def launch(self) -> None:
        self._thread.start()

    def stop(self, *, grace_s: float | None = None) -> None:
        """SIGTERM, and SIGKILL after the grace time. Returns at once."""
        if grace_s is not None:
            self._grace_s = grace_s
        self._stopping.set()

    def join(self) -> None:
        self._thread.join(timeout=30)

    def suffer(self, fault: Fault) -> None:
        match fault.kind:
            case "throttled":
                self._throttled_until = time.monotonic() + fault.seconds
            case "pull_stuck":
                self._pull_stuck = True
            case "pull_fails":
                self._pull_fails = True
            case "start_fails":
                self._start_fails = True
            case "dies" | "vanishes" | "freezes" | "network":
                strike = {
                    "dies": self._vanish,
                    "vanishes": self._vanish,
                    "freezes": self._freeze,
                    "network": lambda: self._host.cut_off(self.id),
                }[fault.kind]
                self._strikes.append((time.monotonic() + fault.after_s, strike))

    def thaw(self) -> None:
        if self._container is not None:
            self._container.thaw()

    def says(self, *, unhealthy: bool = False) -> None:
        """It was heard of."""
        self.heard = time.monotonic()
        if unhealthy:
            self.is_unhealthy = True

    def asks_for_jobs(self) -> None:
        """It is ready, then."""
        self.says()
        if not self.is_ready:
            self.is_ready, self.is_unhealthy = True, False
            self.idle_since = time.monotonic()

    # -- what is told of it ------------------------------------------------------------------------

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def is_placed(self) -> bool:
        return self._placed is not None

    def status(self, *, busy: bool) -> str:
        if not self.is_placed:
            return "THROTTLED"
        if self.is_unhealthy:
            return "UNHEALTHY"
        if not self.is_ready:
            return "INITIALIZING"
        return "RUNNING" if busy else "IDLE"

    def charged_usd(self) -> float:
        """From its placement to its end."""
        if self._placed is None:
            return 0.0
        until = self._ended if self._ended is not None else time.monotonic()
        hours = (until - self._placed) * self._host.settings.clock_speed / 3600
        return hours * self._price_usd_per_h(self.gpu)

    def document(self, *, busy: bool, latest: int) -> dict[str, Any]:
        return {
            "id": self.id,
            "status": self.status(busy=busy),
            "isStale": self.version != latest,
            "version": self.version,
            "gpuCount": self.request["gpu"].get("count", 1) if "gpu" in self.request else 0,
            "image": self.request["image"],
            "uptimeSeconds": None if self._placed is None else int(time.monotonic() - self._placed),
            "gpuTypeId": self.gpu.id if self.gpu else None,
            "dataCenterId": self.data_center,
            "startedAt": timestamp(self.started_at) if self.started_at else None,
        }

    def truth(self, *, busy: bool) -> WorkerTruth:
        container = self._container
        return WorkerTruth(
            id=self.id,
            endpoint=self.endpoint,
            version=self.version,
            image=self.request["image"],
            status=self.status(busy=busy),
            gpu=self.gpu.id if self.gpu else None,
            env=dict(self.request.get("env", {})),
            folder=self.folder,
            process_ids=tuple(self._process_ids),
            living_process_ids=tuple(process.pid for process in container.family()) if container else (),
            charged_usd=self.charged_usd(),
            is_there=self.is_there,
        )

    # -- its life, on a thread of its own ----------------------------------------------------------

    def _run(self) -> None:
        try:
            self._live()
        except Exception:
            self._host.report(f"worker {self.id}: {traceback.format_exc()}")
        finally:
            self._ended = time.monotonic()
            self.is_there = False
            self._on_lost()
            if self.is_placed:
                assert self.data_center is not None
                self._host.give_back(self.request, self.gpu, self.data_center)
            self._host.remove_container(self.id, self.request["image"])

    def _live(self) -> None:
        while not self._stopping.is_set() and not self._find_machine():
            self._wait(_TICK_S)
        failures = 0
        self._pull()
        while not self._stopping.is_set():
            if self._start_container():
                self._watch()
                if self.is_ready:
                    failures = 0
            self._container = None
            self.is_ready = False
            self._on_lost()
            failures += 1
            self.is_unhealthy = self.is_unhealthy or failures >= _FAILURES
            self._wait(self._host.settings.restart_delay_s)

    def _find_machine(self) -> bool:
        found = self._host.place(self.request) if time.monotonic() >= self._throttled_until else None
        if found is None:
            return False
        self.gpu, self.data_center = found
        self._placed = time.monotonic()
        return True

    def _pull(self) -> None:
        image = self.request["image"]
        self.logs.say("system", f"create container {image}")
        fails = self._pull_fails or not self._host.has_image(image)
        if fails:
            self.logs.say("system", f"failed to pull image: manifest for {image} not found")
        if fails or self._pull_stuck:
            while not self._stopping.is_set():
                self._wait(_TICK_S)
        self._wait(self._host.settings.pull_s)

    def _start_container(self) -> bool:
        self.logs.say("system", f"start container for {self.request['image']}: begin")
        try:
            if self._start_fails:
                raise StartFailed("nvidia-container-cli: requirement error: unsatisfied condition")
            command, environment = self._host.container(
                self.id, self.request, self.folder, self._host.worker_environment(self)
            )
            self._container = Container(
                command,
                environment=environment,
                folder=self.folder,
                on_line=lambda line: self.logs.say("container", line),
                on_end=lambda _: None,
            )
        except StartFailed as failure:
            self.logs.say("system", f"error starting container: {failure}")
            return False
        self._process_ids.append(self._container.pid)
        self.started_at = datetime.datetime.now(datetime.UTC)
        self.heard = time.monotonic()
        return True

    def _watch(self) -> None:
        """Until the container ends by itself or is told to."""
        assert self._container is not None
        while self._container.is_alive and not self._stopping.is_set():
            self._wait(_TICK_S)
        if self._stopping.is_set():
            self._container.terminate(grace_s=self._grace_s)
        else:
            self._container.kill()

    def _wait(self, seconds: float) -> None:
        self._stopping.wait(seconds)
        now = time.monotonic()
        due = [strike for at, strike in self._strikes if at <= now]
        self._strikes = [(at, strike) for at, strike in self._strikes if at > now]
        for strike in due:
            strike()

    def _vanish(self) -> None:
        self.stop(grace_s=0.0)
        if self._container is not None:
            self._container.kill()

    def _freeze(self) -> None:
        if self._container is not None:
            self._container.freeze()
