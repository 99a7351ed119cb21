"""What the tests of the emulators share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emulators.runpod import Settings, find_spec, serve
from emulators.runpod.client import Api, python


@pytest.fixture
def runpod(tmp_path: Path) -> Iterator[Callable[..., Api]]:
    """Start emulators: `runpod(program, **settings)`; none may answer against the API's contract."""
    if find_spec() is None:
        pytest.skip("no OpenAPI file of RunPod (set NANOCHAT_RUNPOD_SPEC)")
    opened: list[Any] = []

    def start(program: str = "import time; time.sleep(600)", network: Any = None, **settings: Any) -> Api:
        running = serve(
            images={"*": python(program)},
            state_dir=tmp_path / f"runpod-{len(opened)}",
            settings=Settings(**{"pull_s": 0.02, "restart_delay_s": 0.05, **settings}),
            network=network,
        )
        api = Api(running.__enter__())
        opened.append((running, api))
        return api

    yield start
    for running, _ in opened:
        running.__exit__(None, None, None)
    for _, api in opened:
        assert api.emulator.violations == []
        assert [pod for pod in api.emulator.pods() if pod.living_process_ids] == []
