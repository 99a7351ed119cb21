"""The emulator as a test holds it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from emulators.runpod.catalog import Catalog
from emulators.runpod.control import Control
from emulators.runpod.door import Door
from emulators.runpod.faults import Fault
from emulators.runpod.platform import Platform
from emulators.runpod.pods import PodTruth
from emulators.runpod.registry import ImageRegistry
from emulators.runpod.serverless.job_plane import JobPlane
from emulators.runpod.serverless.workers import WorkerTruth
from emulators.runpod.settings import Image, Settings, find_spec
from emulators.runpod.validation import Contract
from standins.s3_faults import S3FaultProxy
from starlette.types import ASGIApp


class FaultOrders:
    """`add` lets a fault strike; see `faults.Fault` for the kinds and what narrows them."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    def add(self, kind: str, **fields: Any) -> str:
        """Returns the fault's id. Raises pydantic's ValidationError."""
        return self._platform.fault(Fault.model_validate({"kind": kind, **fields}))

    def clear(self, id: str | None = None) -> None:
        """Forget one, or all. What a pod suffers already stays."""
        self._platform.faults.clear(id)

    def hits(self, id: str) -> int:
        return self._platform.faults.hits(id)


class Emulator:
    """A running emulator.

    url: what stands for https://api.runpod.io/v2. jobs_url: what stands for https://api.runpod.ai/v2, in
    the `requestUrls` of endpoints. api_key: the account's key. registry_url: an image registry
    (`registry.publish`); `control_url`: see `control.Control`.
    """

    def __init__(self, platform: Platform, *, spec: Path | None, port: int) -> None:
        self._platform = platform
        self.registry = ImageRegistry()
        self.faults = FaultOrders(self._platform)
        self._door = Door(self._platform, _contract(spec) if spec is not None else None)
        control = Control(self._platform, self._door, self.registry)
        jobs = JobPlane(self._platform, self._door.requests)
        applications: list[ASGIApp] = [self._door, control.app(), self.registry.app(), jobs]
        sockets = [_listening(port), _listening(), _listening(), _listening()]
        self.url, self.control_url, self.registry_url, self.jobs_url = (
            f"http://127.0.0.1:{bound.getsockname()[1]}" for bound in sockets
        )
        self.url += "/v2"
        self.jobs_url += "/v2"
        self._platform.api_url = self.url
        self._platform.serverless.jobs_url = self.jobs_url
        self._servers = [
            uvicorn.Server(
                uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=0, lifespan="off")
            )
            for application in applications
        ]
        self._thread = threading.Thread(target=self._serve, args=(sockets,), name="runpod-emulator")
        self._thread.start()

    @property
    def api_key(self) -> str:
        return self._platform.api_key

    @property
    def settings(self) -> Settings:
        return self._platform.settings

    @property
    def catalog(self) -> Catalog:
        return self._platform.catalog

    @property
    def images(self) -> dict[str, Image]:
        """From a pattern of image references to how they run; may be changed."""
        return self._platform.images

    @property
    def violations(self) -> list[str]:
        """Mistakes of the emulator: answers that its contract does not allow, errors of its own."""
        return self._platform.mistakes

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every request to the API and for jobs so far, oldest first; what workers ask is not among them."""
        return self._door.requests

    def pods(self) -> list[PodTruth]:
        """Every pod there ever was, oldest first."""
        return [pod.truth() for pod in list(self._platform.pods.values())]

    def workers(self) -> list[WorkerTruth]:
        """Every worker of an endpoint there ever was."""
        return self._platform.serverless.truths()

    def logs(self, id: str) -> list[str]:
        """What a pod or a worker has said so far, its system lines included."""
        logs = self._platform.serverless.logs(id) or self._platform.pods[id].logs
        return [line.text for line in logs.after(0)]

    def set_secret(self, name: str, value: str) -> None:
        self._platform.set_secret(name, value)

    def pod_key(self, id: str) -> str:
        return self._platform.pods[id].api_key

    def thaw(self, id: str) -> None:
        """Let a frozen pod or worker go on."""
        (self._platform.serverless.worker(id) or self._platform.pods[id]).thaw()

    def close(self) -> None:
        """End the servers, so that no pod is added, and all pods. Returns when nothing of them is left."""
        for server in self._servers:
            server.should_exit = True
        self._thread.join()
        self._platform.close()

    def _serve(self, sockets: list[socket.socket]) -> None:
        async def serve_all() -> None:
            await asyncio.gather(
                *(server.serve(sockets=[bound]) for server, bound in zip(self._servers, sockets, strict=True))
            )

        asyncio.run(serve_all())


@contextlib.contextmanager
def serve(
    *,
    state_dir: Path,
    images: Mapping[str, Image] | None = None,
    spec: Path | None = None,
    settings: Settings | None = None,
    network: S3FaultProxy | None = None,
    port: int = 0,
) -> Iterator[Emulator]:
    """Run the emulator until the block ends.

    images: from patterns (as file names have them) of image references to how they run; without it every
    image is the training image, run from this checkout. spec: RunPod's OpenAPI file, looked for where
    `settings.find_spec` says; without the file nothing is validated. network: the proxy that
    the pods' store is reached through; each pod gets a port of its own.
    """
    platform = Platform(
        images={"*": Image()} if images is None else images,
        state_dir=state_dir,
        settings=settings or Settings(),
        network=network,
    )
    emulator = Emulator(platform, spec=spec or find_spec(), port=port)
    try:
        yield emulator
    finally:
        emulator.close()


# Reading the file takes longer than starting the emulator, and what is read does not change.
_contract = functools.cache(Contract)


def _listening(port: int = 0) -> socket.socket:
    """From here on clients wait for an answer instead of being refused."""
    # With the protocol named, asyncio sends small answers at once (TCP_NODELAY).
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen(128)
    return server
