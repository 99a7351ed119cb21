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

    def get(self, id: str) -> dict[str, Any]:
        return dict(self("GET", f"/pods/{id}").json())
