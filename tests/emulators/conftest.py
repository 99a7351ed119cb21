"""What the tests of the emulators share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emulators.runpod import Image, Settings, find_spec, serve
from emulators.runpod.client import Api, python


@pytest.fixture
def runpod(tmp_path: Path) -> Iterator[Callable[..., Api]]:
    """Start emulators: `runpod(program, **settings)`; none may answer against the API's contract."""
    if find_spec() is None:
        pytest.skip("no OpenAPI file of RunPod (set NANOCHAT_RUNPOD_SPEC)")
    stack = contextlib.ExitStack()
    opened: list[Api] = []

    def start(
        program: str | None = None, network: Any = None, image: Image | None = None, **settings: Any
    ) -> Api:
        asleep = Image(entrypoint=("sleep", "600"))
        running = serve(
            images={"*": image or (python(program) if program else asleep)},
            state_dir=tmp_path / f"runpod-{len(opened)}",
            settings=Settings(**{"pull_s": 0.02, "restart_delay_s": 0.05, **settings}),
            network=network,
        )
        opened.append(Api(stack.enter_context(running)))
        return opened[-1]

    with stack:
        yield start
    for api in opened:
        assert api.emulator.violations == []
        assert [pod for pod in api.emulator.pods() if pod.living_process_ids] == []
        assert [worker for worker in api.emulator.workers() if worker.living_process_ids] == []
