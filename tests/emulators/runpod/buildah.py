"""Containers from real images, where buildah is installed: one for each pod, kept until the pod goes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping

from emulators.runpod.environment import command_line
from emulators.runpod.processes import StartFailed

PROGRAM = ("buildah", "--storage-driver", "overlay")


def command(name: str, image: str, args: str, environment: Mapping[str, str]) -> list[str]:
    """How the pod `name` is run; its container is made at the first time. Raises StartFailed."""
    if not _exists(name):
        _buildah("from", "--pull-never", "--name", name, image)
    config = json.loads(_buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
    return [
        *PROGRAM,
        "run",
        *("--isolation", "chroot", "--network", "host"),
        *(f"--env={key}={value}" for key, value in environment.items()),
        name,
        "--",
        *command_line(config.get("Entrypoint") or [], config.get("Cmd") or [], args),
    ]


def remove(name: str) -> None:
    """Of a pod that never started, nothing."""
    if _exists(name):
        _buildah("rm", name)


def _exists(name: str) -> bool:
    containers = json.loads(_buildah("containers", "--json")) or []
    return name in [container["containername"] for container in containers]


def _buildah(*arguments: str) -> str:
    try:
        return subprocess.run([*PROGRAM, *arguments], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise StartFailed("buildah is not installed") from error
    except subprocess.CalledProcessError as error:
        raise StartFailed(f"buildah {arguments[0]}: {error.stderr.strip()}") from error
