"""Where RunPod's own SDK is: it needs another click than dg, so it lives in a folder of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from emulators.runpod import Image
from emulators.runpod.settings import REPOSITORY

SITE_ENV = "NANOCHAT_SERVERLESS_SITE"


def sdk_site() -> Path:
    """Skips the test where the SDK is not installed: `make serverless-sdk` does it."""
    site = Path(os.environ.get(SITE_ENV) or REPOSITORY / ".venv/serverless")
    if not (site / "runpod").is_dir():
        pytest.skip(f"no RunPod SDK in {site} (make serverless-sdk installs it, {SITE_ENV} says where)")
    return site


def sdk_environment() -> dict[str, str]:
    """What makes a Python process find the SDK, and this checkout's packages behind it."""
    packages = [str(sdk_site()), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, packages))}


def sdk_worker(program: str) -> Image:
    """An image whose container runs a Python program that may import the SDK."""
    return Image(entrypoint=(sys.executable, "-c", program), environment=sdk_environment())
