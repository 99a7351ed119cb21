"""Containers from real images, where buildah is installed."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from typing import Any

BUILDAH = ("buildah", "--storage-driver", "overlay")


class Buildah:
    """A working container for each pod, made at its first start and kept until the pod goes."""

    def __init__(self) -> None:
        self._made: set[str] = set()

    def command(self, name: str, image: str, args: str, environment: Mapping[str, str]) -> list[str]:
        """How the pod `name` is run. Raises CalledProcessError where buildah does."""
        if name not in self._made:
            _buildah("from", "--name", name, image)
            self._made.add(name)
        config = json.loads(_buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
        return [
            *BUILDAH,
            "run",
            "--isolation",
            "chroot",
            "--network",
            "host",
            *_settings(config, environment),
            name,
            "--",
            *_words(config, args),
        ]

    def remove(self, name: str) -> None:
        if name in self._made:
            self._made.remove(name)
            _buildah("rm", name)


def _settings(config: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """The image brings its own programs: what points to this machine's stays outside."""
    ours = {
        name: value
        for name, value in environment.items()
        if name not in ("PATH", "HOME", "PYTHONPATH", "TMPDIR")
    }
    return [f"--env={name}={value}" for name, value in ours.items()]


def _words(config: Mapping[str, Any], args: str) -> list[str]:
    entrypoint = config.get("Entrypoint") or []
    if args.lstrip().startswith("{"):
        wanted = json.loads(args)
        return [*wanted.get("entrypoint", entrypoint), *wanted.get("cmd", config.get("Cmd") or [])]
    return [*entrypoint, *(shlex.split(args) or config.get("Cmd") or [])]


def _buildah(*arguments: str) -> str:
    return subprocess.run([*BUILDAH, *arguments], check=True, capture_output=True, text=True).stdout
