"""`make images`: which builder it takes, what it tells it, and what it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIGEST = f"sha256:{'5' * 64}"
# Writes its words down, and the digest as the real one does.
BUILDER = """#!/bin/bash
set -euo pipefail
echo "$(basename "$0") $*" >> "$TOLD"
[ "$*" != "buildx version" ] || exit "${NO_BUILDX:-0}"
while [ $# -gt 0 ]; do
  case "$1" in
    --digestfile) printf %s "$DIGEST" > "$2" ;;
    --metadata-file)
      printf '{\\n  "containerimage.config.digest": "sha256:%064d",\\n' 1 > "$2"
      printf '  "containerimage.digest": "%s",\\n  "image.name": "x"\\n}\\n' "$DIGEST" >> "$2" ;;
    fail) exit 3 ;;
  esac
  shift
done
"""


class Machine:
    """A machine on which only some builders are installed."""

    def __init__(self, folder: Path, *builders: str) -> None:
        self.told = folder / "told"
        self.programs = folder / "bin"
        self.programs.mkdir()
        for name in ("bash", "basename", "cat", "find", "git", "grep", "make", "mktemp", "rm", "sed"):
            (self.programs / name).symlink_to(str(shutil.which(name)))
        for name in builders:
            (self.programs / name).write_text(BUILDER)
            (self.programs / name).chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", "--no-print-directory", "images", *arguments],
            cwd=ROOT,
            env={"PATH": str(self.programs), "TOLD": str(self.told), "DIGEST": DIGEST, **environment},
            capture_output=True,
            text=True,
        )

    def commands(self) -> list[str]:
        return [line for line in self.told.read_text().splitlines() if not line.endswith("buildx version")]


def test_without_a_name_it_says_how_to_give_one(tmp_path: Path) -> None:
    result = Machine(tmp_path, "buildah").make()
    assert result.returncode != 0
    assert "make images IMAGE=" in result.stderr


def test_without_a_builder_the_three_are_named(tmp_path: Path) -> None:
    result = Machine(tmp_path).make("IMAGE=x/y:1")
    assert result.returncode != 0
    assert re.search("docker buildx, podman or buildah: none .* installed", result.stderr)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("docker", "podman", "buildah"), "docker buildx build"),
        (("podman", "buildah"), "podman build"),
        (("buildah",), "buildah build"),
    ],
)
def test_the_first_builder_that_is_there_builds_for_the_rented_machines(
    tmp_path: Path, there: tuple[str, ...], taken: str
) -> None:
    machine = Machine(tmp_path, *there)
    result = machine.make("IMAGE=x.example/y:1", "BASE_IMAGE=base@sha256:1")
    assert result.returncode == 0, result.stderr
    (command,) = machine.commands()
    assert command.startswith(taken)
    for word in (
        "--file Dockerfile.training",
        "--platform linux/amd64",
        "--tag x.example/y:1",
        "--build-arg BASE_IMAGE=base@sha256:1",
    ):
        assert word in command
    assert re.search(r"--label org.opencontainers.image.revision=[0-9a-f]{40}\+? ", command)
    assert "sha256:5" not in result.stdout


def test_docker_without_buildx_is_no_builder(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "docker", "podman")
    assert machine.make("IMAGE=x/y:1", NO_BUILDX="1").returncode == 0
    assert machine.commands()[0].startswith("podman")


@pytest.mark.parametrize("builder", ["docker", "podman", "buildah"])
@pytest.mark.parametrize("name", ["127.0.0.1:5000/team/nanochat", "x.example/nanochat"])
def test_a_push_ends_with_the_reference_by_digest(tmp_path: Path, builder: str, name: str) -> None:
    machine = Machine(tmp_path, builder)
    for given in (f"{name}:1", name):
        result = machine.make(f"IMAGE={given}", "PUSH=1")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"{name}@{DIGEST}"


@pytest.mark.parametrize("builder", ["docker", "podman", "buildah"])
def test_a_failed_build_is_not_pushed(tmp_path: Path, builder: str) -> None:
    machine = Machine(tmp_path, builder)
    result = machine.make("IMAGE=x/y:1", "PUSH=1", "BUILD_FLAGS=fail")
    assert result.returncode != 0
    assert len(machine.commands()) == 1
    assert DIGEST not in result.stdout
