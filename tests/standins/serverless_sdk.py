"""Images whose containers run RunPod's own SDK."""

from __future__ import annotations

import sys

import pytest
from emulators.runpod import Image
from emulators.runpod.settings import REPOSITORY, SDK_ENV, sdk_environment, sdk_folder

HANDLER = REPOSITORY / "serverless" / "handler.py"


def sdk_image(*command: str, **environment: str) -> Image:
    """A container of the image runs Python with these arguments; without any, our own worker. Skips the
    test where the SDK is not installed."""
    if not (sdk_folder() / "runpod").is_dir():
        pytest.skip(
            f"no RunPod SDK in {sdk_folder()} (make serverless-sdk installs it, {SDK_ENV} says where)"
        )
    return Image(
        entrypoint=(sys.executable, *(command or (str(HANDLER),))),
        environment={**sdk_environment(), **environment},
    )
