"""The API as a test calls it without a client of ours."""

from __future__ import annotations

import sys
from typing import Any

import httpx
from emulators.runpod.emulator import Emulator
from emulators.runpod.settings import Image

GPU = "NVIDIA L40S"


def python(program: str) -> Image:
    """An image whose containers run a Python program."""
    return Image(entrypoint=(sys.executable, "-c", program))


class Api:
    """The emulator and a client with the account's key, or another."""

    def __init__(self, emulator: Emulator, key: str | None = None) -> None:
        self.emulator = emulator
        headers = {"Authorization": f"Bearer {key or emulator.api_key}"}
        # Certificates play no part, and reading them takes time.
        self._client = httpx.Client(
            base_url=emulator.url, headers=headers, timeout=10, trust_env=False, verify=False
        )

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._client.request(method, path, **options)

    def create(self, **fields: Any) -> dict[str, Any]:
        """A new pod with one GPU."""
        answer = self("POST", "/pods", json={"name": "a", "image": "img", "gpu": {"id": GPU}, **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def create_endpoint(self, **fields: Any) -> dict[str, Any]:
        """A new queue endpoint on one GPU; `workers` is merged into 0 to 1 workers."""
        workers = {"min": 0, "max": 1, **fields.pop("workers", {})}
        body = {
            "name": "a",
            "type": "QUEUE",
            "image": "img",
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": 0.5},
            "gpu": {"pools": ["ADA_48_PRO"]},
            **fields,
        }
        answer = self("POST", "/serverless", json={**body, "workers": workers})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def get(self, id: str) -> dict[str, Any]:
        return dict(self("GET", f"/pods/{id}").json())


class Jobs:
    """The jobs of an endpoint, as a caller without a client of ours has them."""

    def __init__(self, api: Api, endpoint: dict[str, Any]) -> None:
        self.url = f"{api.emulator.jobs_url}/{endpoint['id']}"
        headers = {"Authorization": f"Bearer {api.emulator.api_key}"}
        self._client = httpx.Client(headers=headers, timeout=120, trust_env=False, verify=False)

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._client.request(method, f"{self.url}{path}", **options)

    def run(self, input: Any, **fields: Any) -> str:
        """Returns the job's id."""
        answer = self("POST", "/run", json={"input": input, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def run_sync(self, input: Any) -> dict[str, Any]:
        return dict(self("POST", "/runsync", json={"input": input}).json())

    def status(self, id: str) -> dict[str, Any]:
        return dict(self("GET", f"/status/{id}").json())

    def outputs(self, id: str) -> list[Any]:
        """All that the job streams, until it has ended."""
        said: list[Any] = []
        while True:
            answer = self("GET", f"/stream/{id}").json()
            said += [chunk["output"] for chunk in answer["stream"]]
            if answer["status"] not in ("IN_QUEUE", "IN_PROGRESS") and not answer["stream"]:
                return said
