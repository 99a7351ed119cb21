"""An account at an emulated RunPod whose pods train on this machine: what the launcher is told of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulators.runpod import Emulator, Image, serve
from standins import nvidia_smi

IMAGE = "registry.example/nanochat-training@sha256:" + "ab" * 32


@contextlib.contextmanager
def account(
    folder: Path, environment: pytest.MonkeyPatch, *, silent_s: float, network: Any = None
) -> Iterator[Emulator]:
    """Its secrets are those of the environment's S3 server. silent_s: how long a pod may be silent. network:
    see `emulators.runpod.serve`."""
    from dagster_nanochat.launch.base import Patience
    from dagster_nanochat.launch.runpod import launcher

    programs = [str(nvidia_smi.write(folder / "bin")), str(Path(sys.executable).parent), os.environ["PATH"]]
    image = Image(environment={"PATH": os.pathsep.join(programs)})
    with serve(state_dir=folder / "runpod", images={"*": image}, network=network) as emulator:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            emulator.set_secret(name, os.environ[name])
        environment.setenv("NANOCHAT_LAUNCHER", "runpod")
        environment.setenv("RUNPOD_API_URL", emulator.url)
        environment.setenv("RUNPOD_API_KEY", emulator.api_key)
        environment.setattr(launcher, "_LOOK_EVERY_S", 1.0)
        environment.setattr(launcher, "_LIST_EVERY_S", 0.2)
        patience = Patience(ready_s=60.0, silent_s=silent_s, capacity_s=30.0)
        environment.setattr(launcher, "PATIENCE", patience)
        yield emulator
