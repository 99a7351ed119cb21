"""Images built and run without a daemon: buildah over a Debian of debootstrap's making.

Everything lies in one temporary folder. Packages come from the caches that this machine's uv and cargo
already have, and the Rust toolchain is this machine's, mounted: nothing is downloaded twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
BASE = "localhost/base"
_PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap", "docker-registry": "docker-registry"}
# g++ links the Rust crate, too; the headers are what torch.compile compiles against.
_PACKAGES = "ca-certificates,g++,python3,python3-dev,python3-venv"
_BASE_TAR = REPOSITORY / ".tools" / "debian-bookworm.tar"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def missing() -> str | None:
    """Why images cannot be built here; None where they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "images are built for linux/amd64, and on it"
    if os.getuid() != 0:
        return "buildah --isolation chroot and debootstrap need root"
    programs = [package for program, package in _PROGRAMS.items() if not shutil.which(program)]
    if programs:
        return f"not installed: {', '.join(programs)} (Debian: apt-get install {' '.join(programs)})"
    return None if shutil.which("cargo") else "Rust (cargo) is not installed"


class Workbench:
    """A place to build and run images, with `localhost/base` in it. environment: what buildah needs to
    know of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        caches = folder / "tmp" / "buildah-cache"  # where buildah looks for its --mount=type=cache
        caches.mkdir(parents=True)
        home = Path.home()
        _link(caches / "uv", Path(os.environ.get("UV_CACHE_DIR") or home / ".cache" / "uv"))
        _link(caches / "cargo", Path(os.environ.get("CARGO_HOME") or home / ".cargo") / "registry")
        storage = {"driver": "overlay", "graphroot": str(folder / "images"), "runroot": str(folder / "run")}
        (folder / "storage.conf").write_text(_toml("storage", storage))
        # No registry's password. buildah insists on the file where this folder is DOCKER_CONFIG.
        (folder / "config.json").write_text("{}")
        rust = _output(["rustc", "--print", "sysroot"])
        containers = {"netns": "host", "volumes": [f"{rust}:/opt/rust:ro"]}
        (folder / "containers.conf").write_text(_toml("containers", containers))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "TMPDIR": str(folder / "tmp"),
        }

    def buildah(self, *arguments: str) -> str:
        """What it printed."""
        return _output(["buildah", *arguments], env=self.environment)

    def make_base(self) -> None:
        """Debian with Python 3.11 and a C++ compiler, as a machine of this network: what it trusts, this
        trusts. Debian's part is kept for the next time."""
        if not _BASE_TAR.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as tree:
                _output(["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", tree])
                _BASE_TAR.parent.mkdir(exist_ok=True)
                partial = _BASE_TAR.with_suffix(".partial")
                excluded = ["--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*"]
                _output(["tar", "-C", tree, *excluded, "-cf", str(partial), "."])
                partial.rename(_BASE_TAR)
        container = self.buildah("from", "scratch")
        root = Path(self.buildah("mount", container))
        _output(["tar", "-C", str(root), "-xf", str(_BASE_TAR)])
        shutil.copy(_CERTIFICATES, root / "etc/ssl/certs")
        (root / "etc/pip.conf").write_text(f"[global]\ncert = {_CERTIFICATES}\n")
        (root / "etc/uv").mkdir()
        (root / "etc/uv/uv.toml").write_text("system-certs = true\n")
        for name in ("cargo", "rustc"):
            (root / "usr/local/bin" / name).symlink_to(f"/opt/rust/bin/{name}")
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.buildah("config", "--env", f"PATH={path}", "--env", "CARGO_HOME=/usr/local/cargo", container)
        self.buildah("commit", "--quiet", "--rm", container, BASE)

    def inspect(self, image: str) -> dict[str, Any]:
        """The image's configuration as the OCI image spec has it."""
        return json.loads(self.buildah("inspect", "--type", "image", image))["OCIv1"]["config"]

    def run(
        self, image: str, command: list[str], *, mounts: dict[Path, str], environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of the image, as an engine would."""
        container = self.buildah("from", "--pull-never", image)
        # An engine makes the container's name known to it, which torchrun looks up; buildah does not.
        options = ["--hostname", "localhost"]
        options += [word for host, inside in mounts.items() for word in ("-v", f"{host}:{inside}")]
        options += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        return subprocess.run(
            ["buildah", "run", *options, container, "--", *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )


@contextlib.contextmanager
def workbench() -> Iterator[Workbench]:
    """A workbench with its base image; nothing of it stays but Debian's packages."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-images-"))
    bench = Workbench(folder)
    try:
        bench.make_base()
        yield bench
    finally:
        bench.buildah("rm", "--all")
        subprocess.run(["umount", str(folder / "images" / "overlay")], stderr=subprocess.DEVNULL)
        shutil.rmtree(folder)


def _link(link: Path, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    link.symlink_to(cache)


def _toml(section: str, fields: dict[str, Any]) -> str:
    return f"[{section}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


def _output(command: list[str], env: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stderr[-3000:]}"
    return result.stdout.strip()
