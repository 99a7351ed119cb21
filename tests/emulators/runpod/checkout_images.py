"""Images that run this checkout's own code as it is, so nothing is built or pulled."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from emulators.runpod.settings import REPOSITORY, Image, sdk_environment
from standins import nvidia_smi


def training_image(programs: Path) -> Image:
    """For training, on machines with GPUs. programs: a folder for a stand-in for nvidia-smi, if need be."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if shutil.which("nvidia-smi") is None:
        path.insert(0, str(nvidia_smi.write(programs, count=8, name="NVIDIA H100 80GB HBM3", memory_gib=80)))
    return Image(environment={"PATH": os.pathsep.join(path)})


def serverless_image() -> Image:
    """The worker, without weights: it pulls them from the store."""
    return Image(
        entrypoint=(sys.executable, str(REPOSITORY / "serverless" / "handler.py")),
        environment=sdk_environment(),
    )
