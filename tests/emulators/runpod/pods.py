"""A pod: its life as a sequence of steps on a thread of its own."""

from __future__ import annotations

import dataclasses
import datetime
import heapq
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from emulators.runpod.catalog import Gpu
from emulators.runpod.faults import Fault
from emulators.runpod.logs import PodLogs, timestamp
from emulators.runpod.processes import Container, StartFailed
from emulators.runpod.settings import Settings

ACTIONS = {
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "TERMINATED": [],
}
_PULL_TOLD_EVERY_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a pod came to lie, and what it costs: USD per hour for all its GPUs."""

    gpu: Gpu | None
    count: int
    cloud: str
    data_center: str
    cuda_version: str | None
    price_usd_per_h: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """A pod's place in a cluster."""

    cluster: str
    rank: int
    ip: str
    environment: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodTruth:
    """What is so, whatever the API says. process_ids: of every start of the pod's command."""

    id: str
    name: str
    image: str
    status: str
    gpu: str | None
    env: dict[str, str]
    folder: Path
    process_ids: tuple[int, ...]
    living_process_ids: tuple[int, ...]
    price_usd_per_h: float
    charged_usd: float
    created_at: datetime.datetime
    deleted_at: datetime.datetime | None
    cluster: str | None


class Platform(Protocol):
    """What a pod needs of the platform around it."""

    settings: Settings

    def has_image(self, reference: str) -> bool: ...

    def pod_container(self, pod: Pod) -> tuple[Sequence[str], Mapping[str, str]]:
        """How the pod's container is started here: command and environment. Raises StartFailed."""
        ...

    def cut_off(self, id: str) -> None: ...

    def wipe(self, pod: Pod) -> None:
        """The pod's container disk goes."""
        ...

    def gone(self, pod: Pod) -> None: ...

    def report(self, mistake: str) -> None:
        """Of the emulator's own."""
        ...


class Pod:
    """`request` is the body it was created with; PATCH changes it."""

    def __init__(
        self,
        platform: Platform,
        *,
        id: str,
        api_key: str,
        request: dict[str, Any],
        placement: Placement,
        folder: Path,
        membership: Membership | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.id = id
        self.api_key = api_key
        self.request = request
        self.placement = placement
        self.membership = membership
        self.folder = folder
        self.container_folder = folder / "container"
        self.container_folder.mkdir(parents=True)
        self.logs = PodLogs()
        self.created_at = datetime.datetime.now(datetime.UTC)
        self.started_at: datetime.datetime | None = None
        self.deleted_at: datetime.datetime | None = None
        self.status = "RUNNING" if platform.settings.mode == "instant" else "PROVISIONING"
        self.locked = False
        self._platform = platform
        self._process_ids: list[int] = []
        self._born = time.monotonic()
        self._ended: float | None = None
        self._container: Container | None = None
        self._container_since: float | None = None
        self._pull_stuck = self._pull_fails = self._start_fails = False
        self._runtime_null_s = platform.settings.runtime_null_s
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        self._steps: list[tuple[float, int, int | None, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._epoch = 0
        self._thread = threading.Thread(target=self._run, name=f"pod-{id}", daemon=True)
        for fault in faults:
            self.suffer(fault)

    # -- what the platform's routes and the faults ask for -----------------------------------------

    def launch(self) -> None:
        self._boot()
        self._thread.start()

    def stop(self) -> None:
        self.status = "EXITED"
        self._order(self._stop)

    def start(self) -> None:
        self.status = "STARTING" if self._platform.settings.mode == "phased" else "RUNNING"
        self._order(self._start_anew)

    def restart(self) -> None:
        self._order(self._restart)

    def terminate(self) -> None:
        self.status = "TERMINATED"
        self._order(self._terminate)

    def terminate_later(self, seconds: float) -> None:
        self._order(lambda: self._later(seconds, self._terminate, whatever_happens=True))

    def reset(self) -> None:
        """After a change of its configuration: the container is made anew."""
        self._order(self._start_anew)

    def suffer(self, fault: Fault) -> None:
        """Let a pod's fault strike, `after_s` from now."""
        match fault.kind:
            case "pull_stuck":
                self._pull_stuck = True
            case "pull_fails":
                self._pull_fails = True
            case "start_fails":
                self._start_fails = True
            case "runtime_null":
                self._runtime_null_s = fault.seconds
            case _:
                strike = {
                    "dies": lambda: self._die(fault.state),
                    "vanishes": self._vanish,
                    "freezes": self._freeze,
                    "network": lambda: self._platform.cut_off(self.id),
                }[fault.kind]
                self._order(lambda: self._later(fault.after_s, strike, whatever_happens=True))

    def thaw(self) -> None:
        if self._container is not None:
            self._container.thaw()

    def close(self) -> None:
        """The emulator ends: nothing of the pod stays, without ceremony."""
        self._order(self._vanish)
        self._thread.join(timeout=30)

    # -- what is told of it ------------------------------------------------------------------------

    @property
    def is_there(self) -> bool:
        return self.deleted_at is None

    def hours(self) -> float:
        """What is billed so far: from creation to deletion, whatever its status."""
        until = self._ended if self._ended is not None else time.monotonic()
        return (until - self._born) * self._platform.settings.clock_speed / 3600

    def truth(self) -> PodTruth:
        container = self._container
        family = container.family() if container else []
        return PodTruth(
            id=self.id,
            name=self.request["name"],
            image=self.request["image"],
            status=self.status,
            gpu=self.placement.gpu.id if self.placement.gpu else None,
            env=dict(self.request.get("env", {})),
            folder=self.container_folder,
            process_ids=tuple(self._process_ids),
            living_process_ids=tuple(process.pid for process in family),
            price_usd_per_h=self.placement.price_usd_per_h,
            charged_usd=self.hours() * self.placement.price_usd_per_h,
            created_at=self.created_at,
            deleted_at=self.deleted_at,
            cluster=self.membership.cluster if self.membership else None,
        )

    def document(self) -> dict[str, Any]:
        """The pod as the API tells it."""
        request, placement = self.request, self.placement
        networking: dict[str, Any] = {"enabled": bool(request.get("globalNetworking", False))}
        if networking["enabled"]:
            networking |= {"ip": "10.1.0.2", "internalDns": f"{self.id}.runpod.internal"}
        document: dict[str, Any] = {
            "id": self.id,
            "name": request["name"],
            "image": request["image"],
            "args": request.get("args", ""),
            "disk": request.get("disk", 20),
            "ports": request.get("ports", []),
            "env": request.get("env", {}),
            "registry": request.get("registry"),
            "status": self.status,
            "actions": ACTIONS[self.status],
            "mounts": request.get("mounts", {}),
            "cloud": placement.cloud,
            "dataCenterId": placement.data_center,
            "cudaVersion": placement.cuda_version,
            "ssh": {
                "proxy": {
                    "host": "ssh.runpod.io",
                    "port": 22,
                    "username": f"{self.id}-64411eb2",
                    "command": f"ssh {self.id}-64411eb2@ssh.runpod.io",
                },
                "direct": None,
            },
            "template": None,
            "cost": placement.price_usd_per_h,
            "locked": self.locked,
            "globalNetworking": networking,
            "runtime": self._runtime(),
            "createdAt": timestamp(self.created_at),
            "startedAt": timestamp(self.started_at) if self.started_at else None,
        }
        if placement.gpu is not None:
            document["gpu"] = {"id": placement.gpu.id, "count": placement.count}
        else:
            document["cpu"] = {**request["cpu"], "memory": 4 * request["cpu"]["vcpuCount"]}
        if self.membership is not None:
            document["cluster"] = {
                "id": self.membership.cluster,
                "rank": self.membership.rank,
                "ip": self.membership.ip,
            }
        return document

    def _runtime(self) -> dict[str, Any] | None:
        since = self._container_since
        if since is None or time.monotonic() - since < self._runtime_null_s:
            return None
        ports = [port.split("/") for port in self.request.get("ports", [])]
        return {
            "uptime": int(time.monotonic() - since),
            "gpus": [{"util": 0, "memoryUtil": 0} for _ in range(self.placement.count)],
            "cpu": {"util": 1},
            "memory": {"util": 1},
            "ports": [
                {
                    "private": int(number),
                    "public": public_port(int(number)) if kind == "tcp" else None,
                    "type": kind,
                    # The proxy's inside for HTTP, as was seen; only TCP has a public address.
                    "ip": "127.0.0.1" if kind == "tcp" else "100.64.0.2",
                }
                for number, kind in ports
            ],
        }

    # -- the steps, all on the pod's thread --------------------------------------------------------

    def _run(self) -> None:
        while self._ended is None:
            timeout = max(0.0, self._steps[0][0] - time.monotonic()) if self._steps else None
            try:
                step = self._inbox.get(timeout=timeout)
            except queue.Empty:
                _, _, epoch, step = heapq.heappop(self._steps)
                if epoch not in (None, self._epoch):
                    continue
            try:
                step()
            except Exception:
                self._platform.report(f"pod {self.id}: {traceback.format_exc()}")

    def _order(self, step: Callable[[], None]) -> None:
        self._inbox.put(step)

    def _later(self, seconds: float, step: Callable[[], None], *, whatever_happens: bool = False) -> None:
        epoch = None if whatever_happens else self._epoch
        heapq.heappush(self._steps, (time.monotonic() + seconds, next(self._numbers), epoch, step))

    def _boot(self) -> None:
        if self._platform.settings.mode == "phased":
            self._later(self._platform.settings.provisioning_s, self._pull)
        else:
            self._pull()

    def _pull(self) -> None:
        image = self.request["image"]
        self.logs.say("system", f"create container {image}")
        if self._pull_fails or not self._platform.has_image(image):
            self.logs.say("system", f"failed to pull image: manifest for {image} not found")
            self._stay_pulling()
        elif self._pull_stuck:
            self._stay_pulling()
        else:
            if self.status == "PROVISIONING":
                self.status = "STARTING"
            self._later(self._platform.settings.pull_s, self._start_container)

    def _stay_pulling(self) -> None:
        """RUNNING, as was seen, while there is nothing that runs."""
        self.status = "RUNNING"
        self.logs.say("system", f"error creating container: image pull: {self.request['image']}: pending")
        self._later(_PULL_TOLD_EVERY_S, self._stay_pulling)

    def _start_container(self) -> None:
        image = self.request["image"]
        self.status = "RUNNING"
        self.logs.say("system", f"start container for {image}: begin")
        try:
            if self._start_fails:
                raise StartFailed(
                    "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.2, please "
                    "update your driver to a newer version"
                )
            command, environment = self._platform.pod_container(self)
            self._container = Container(
                command,
                environment=environment,
                folder=self.container_folder,
                on_line=lambda line: self.logs.say("container", line),
                on_end=lambda container: self._order(lambda: self._exited(container)),
            )
        except StartFailed as failure:
            self.logs.say("system", f"error starting container: {failure}")
            self._later(self._platform.settings.restart_delay_s, self._start_container)
            return
        self._process_ids.append(self._container.pid)
        self._container_since = time.monotonic()
        self.started_at = self.started_at or datetime.datetime.now(datetime.UTC)

    def _exited(self, container: Container) -> None:
        """A container that ends by itself is started again in the same folder, and nobody says why."""
        if container is self._container:
            self._container = self._container_since = None
            self._later(self._platform.settings.restart_delay_s, self._start_container)

    def _end_container(self, *, grace_s: float | None = None) -> None:
        self._epoch += 1
        container, self._container, self._container_since = self._container, None, None
        if container is None:
            return
        if grace_s is None:
            container.kill()
        else:
            container.terminate(grace_s=grace_s)

    def _stop(self) -> None:
        self.status = "EXITED"
        self.logs.say("system", "stop container")
        self._end_container(grace_s=self._platform.settings.stop_grace_s)
        self.logs.forget_container()

    def _start_anew(self) -> None:
        """With an empty container disk."""
        self._end_container(grace_s=self._platform.settings.stop_grace_s)
        self.logs.forget_container()
        self._platform.wipe(self)
        self.container_folder.mkdir()
        self._pull()

    def _restart(self) -> None:
        self._end_container(grace_s=self._platform.settings.stop_grace_s)
        self._start_container()

    def _terminate(self) -> None:
        self._stop()
        self.status = "TERMINATED"
        self.logs.say("system", "remove container")
        self._gone()

    def _die(self, state: str) -> None:
        self._end_container()
        self.status = state

    def _vanish(self) -> None:
        self._end_container()
        self.status = "TERMINATED"
        self._gone()

    def _freeze(self) -> None:
        if self._container is not None:
            self._container.freeze()

    def _gone(self) -> None:
        self._ended = time.monotonic()
        try:
            self._platform.gone(self)
        finally:
            self.deleted_at = datetime.datetime.now(datetime.UTC)


def public_port(private: int) -> int:
    """The number under which a TCP port is seen from outside. Nothing listens there."""
    return 10_000 + private % 50_000
