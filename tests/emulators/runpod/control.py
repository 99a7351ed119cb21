"""The control port: faults, settings, prices and the truth, while the emulator runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from emulators.runpod.door import Door
from emulators.runpod.faults import Fault
from emulators.runpod.platform import Platform
from emulators.runpod.registry import ImageRegistry
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_WRONG = (KeyError, TypeError, ValueError)


class Control:
    def __init__(self, platform: Platform, door: Door, registry: ImageRegistry) -> None:
        self._platform = platform
        self._door = door
        self._registry = registry

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/faults", self.faults, methods=["GET", "POST", "DELETE"]),
                Route("/faults/{id}", self.clear_fault, methods=["DELETE"]),
                Route("/s3/faults", self.s3_faults, methods=["POST", "DELETE"]),
                Route("/settings", self.settings, methods=["GET", "PATCH"]),
                Route("/prices", self.prices, methods=["PUT"]),
                Route("/stock", self.stock, methods=["PUT"]),
                Route("/images", self.images, methods=["PUT"]),
                Route("/pods", self.pods),
                Route("/workers", self.workers),
                Route("/requests", self.requests),
                Route("/violations", self.violations),
            ],
            exception_handlers={ValidationError: _invalid, **dict.fromkeys(_WRONG, _unknown)},
        )

    async def faults(self, request: Request) -> Response:
        """POST a Fault as JSON: {"kind": "no_capacity", "gpu": "H100", "times": null}."""
        if request.method == "POST":
            fault = Fault.model_validate(await request.json())
            return JSONResponse({"id": self._platform.fault(fault)}, status_code=201)
        if request.method == "DELETE":
            self._platform.faults.clear()
        return JSONResponse(self._platform.faults.listed())

    async def clear_fault(self, request: Request) -> Response:
        self._platform.faults.clear(request.path_params["id"])
        return JSONResponse(self._platform.faults.listed())

    async def s3_faults(self, request: Request) -> Response:
        """POST {"kind": "status", "match": "PUT", "status": 503, "times": 3}; see the proxy's faults."""
        if self._platform.network is None:
            raise ValueError("the emulator was started without an S3 proxy")
        if request.method == "POST":
            self._platform.network.add(**await request.json())
            return Response(status_code=201)
        self._platform.network.clear()
        return Response(status_code=204)

    async def settings(self, request: Request) -> Response:
        """PATCH {"mode": "phased", "clock_speed": 3600}; see Settings."""
        settings = self._platform.settings
        if request.method == "PATCH":
            changed = type(settings).model_validate({**settings.model_dump(), **await request.json()})
            for name, value in changed:
                setattr(settings, name, value)
        return JSONResponse(settings.model_dump())

    async def prices(self, request: Request) -> Response:
        """PUT {"gpu": …, "secure": 2.5, "community": null}: USD per GPU and hour."""
        body = await request.json()
        self._platform.catalog.set_price(
            body["gpu"], secure=body.get("secure"), community=body.get("community")
        )
        return Response(status_code=204)

    async def stock(self, request: Request) -> Response:
        """PUT {"gpu": …, "data_center": …, "cloud": "SECURE", "free": 2}."""
        body = await request.json()
        place = (body["gpu"], body["data_center"], body["cloud"])
        self._platform.catalog.stock[place] = int(body["free"])
        return Response(status_code=204)

    async def images(self, request: Request) -> Response:
        """PUT {"name": "nanochat", "tag": "1", "content": "…"}: publish an image; answers its digest."""
        body = await request.json()
        digest = self._registry.publish(body["name"], body["tag"], body.get("content", ""))
        return JSONResponse({"digest": digest})

    async def pods(self, request: Request) -> Response:
        truths = [dataclasses.asdict(pod.truth()) for pod in list(self._platform.pods.values())]
        return JSONResponse([_plain(truth) for truth in truths])

    async def workers(self, request: Request) -> Response:
        truths = [dataclasses.asdict(truth) for truth in self._platform.serverless.truths()]
        return JSONResponse([_plain(truth) for truth in truths])

    async def requests(self, request: Request) -> Response:
        return JSONResponse(self._door.requests)

    async def violations(self, request: Request) -> Response:
        return JSONResponse(self._platform.mistakes)


def _plain(truth: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if value is None or isinstance(value, (str, int, float, dict)) else _text(value)
        for name, value in truth.items()
    }


def _text(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    return JSONResponse({"errors": error.errors(include_url=False)}, status_code=422)


async def _unknown(request: Request, error: Exception) -> Response:
    return JSONResponse({"errors": [f"{type(error).__name__}: {error}"]}, status_code=422)
