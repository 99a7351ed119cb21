"""The RunPod emulator runs real images where buildah is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import psutil
import pytest
from emulators.runpod import Image
from emulators.runpod.buildah import PROGRAM
from standins.waiting import wait_for

_NAME = "localhost/emulator-test"
_SCRIPT = "read old < /mark; echo $RUNPOD_POD_ID $A $0 $old; echo kept > /mark; [ $old ] && exec sleep 600"


def _buildah(*arguments: str) -> str:
    return subprocess.run([*PROGRAM, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A small image from this machine's shell: a script, and nothing that its libraries do not need."""
    if shutil.which("buildah") is None or os.geteuid() != 0:
        pytest.skip("needs buildah, as root")
    root = tmp_path_factory.mktemp("image")
    for folder in ("bin", "tmp", "etc"):
        (root / folder).mkdir(parents=True)
    (root / "mark").touch()
    for program in ("sh", "sleep"):
        path = shutil.which(program)
        assert path is not None
        shutil.copy(path, root / "bin" / program)
        linked = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
        for library in re.findall(r"(/\S+) \(", linked):
            target = root / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
    container = _buildah("from", "scratch")
    try:
        _buildah("copy", container, str(root), "/")
        _buildah("config", "--entrypoint", f'["/bin/sh", "-c", "{_SCRIPT}"]', "--env", "PATH=/bin", container)
        _buildah("config", "--cmd", "from-image", container)
        _buildah("commit", container, _NAME)
        yield _NAME
    finally:
        _buildah("rm", container)
    _buildah("rmi", _NAME)


def test_a_pod_runs_in_its_image_and_its_disk_survives_a_restart(runpod, image: str):
    api = runpod()
    api.emulator.images["*"] = Image(buildah=image)
    pod = api.create(env={"A": "from-request"})
    said = f"{pod['id']} from-request from-image"
    wait_for(
        lambda: (
            [said, f"{said} kept"] == [line.strip() for line in api.emulator.logs(pod["id"]) if said in line]
        )
    )
    family = [psutil.Process(id) for id in api.emulator.pods()[0].living_process_ids]
    assert "sleep" in [process.name() for process in family]
    api("DELETE", f"/pods/{pod['id']}")
    wait_for(lambda: api("GET", f"/pods/{pod['id']}").status_code == 404)
    assert not any(process.is_running() for process in family)
    assert pod["id"] not in _buildah("containers")


def test_an_image_that_buildah_does_not_have_never_starts(runpod, image: str):
    api = runpod()
    api.emulator.images["*"] = Image(buildah="localhost/none")
    pod = api.create()
    wait_for(
        lambda: any("error starting container: buildah" in line for line in api.emulator.logs(pod["id"]))
    )
