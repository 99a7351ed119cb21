"""The Makefile's set-up: its `.env`, its instance file, its CPU-only list, and its idleness."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


# What `make test` hands on, and what a person may have chosen for their own set-up.
_FROM_OUTSIDE = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "TORCH", "PYTHON", "PYTEST")


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _FROM_OUTSIDE}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def make(folder: Path, *arguments: str) -> str:
    result = run_make(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as the set-up of `.env` looks at."""
    folder = tmp_path / "here"
    for name in ("Makefile", "requirements.lock", "tools.lock", "src/dagster_nanochat/instance.yaml"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (folder / "rustbpe").mkdir()
    return folder


def test_the_environment_file_names_an_absolute_home_and_no_module(checkout: Path) -> None:
    checkout.joinpath(".env").write_text("DAGSTER_MODULE_NAME=dagster_nanochat.definitions\nMINE=1\n")
    make(checkout, "environment")
    assert (checkout / ".env").read_text().splitlines() == ["MINE=1", f"DAGSTER_HOME={checkout}/.dagster"]
    assert "telemetry" in (checkout / ".dagster" / "dagster.yaml").read_text()


def test_what_a_person_wrote_into_the_environment_and_instance_files_stays(checkout: Path) -> None:
    (checkout / ".env").write_text("HF_TOKEN=mine\nDAGSTER_HOME=/somewhere/else\n")
    (checkout / ".dagster").mkdir()
    (checkout / ".dagster" / "dagster.yaml").write_text("mine: true\n")
    make(checkout, "environment")
    assert (checkout / ".env").read_text().splitlines()[:2] == [
        "HF_TOKEN=mine",
        "DAGSTER_HOME=/somewhere/else",
    ]
    assert (checkout / ".dagster" / "dagster.yaml").read_text() == "mine: true\n"


def test_a_checkout_that_moved_gets_its_new_home_and_makes_its_environment_again(checkout: Path) -> None:
    make(checkout, "environment")
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "made-in").write_text(f"{checkout}\n")
    make(checkout, "environment")
    assert (checkout / ".venv").exists()
    moved = checkout.rename(checkout.with_name("there"))
    make(moved, "environment")
    assert f"DAGSTER_HOME={moved}/.dagster" in (moved / ".env").read_text().splitlines()
    assert not (moved / ".venv").exists()


def test_the_list_for_the_cpu_build_is_the_lock_without_pytorch_and_its_gpu_libraries(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    make(checkout, ".venv/requirements-cpu.lock")

    def pins(path: Path) -> set[str]:
        return set(re.findall(r"^([a-z0-9-]+)==", path.read_text(), re.MULTILINE))

    everything = pins(checkout / "requirements.lock")
    without = pins(checkout / ".venv" / "requirements-cpu.lock")
    assert {"numpy", "dagster", "nvidia-cublas", "triton", "torch"} <= everything
    assert without < everything
    assert all(re.match(r"torch$|triton$|nvidia-|cuda-", name) for name in everything - without)
    assert not any(re.match(r"torch$|triton$|nvidia-|cuda-", name) for name in without)
    digests = (checkout / ".venv" / "requirements-cpu.lock").read_text().count("--hash=sha256:")
    assert digests > len(without)


def test_an_unknown_build_of_pytorch_is_refused(checkout: Path) -> None:
    result = run_make(checkout, "TORCH=rocm", "environment")
    assert result.returncode != 0
    assert "write default or cpu" in result.stderr


def test_where_nothing_has_changed_the_set_up_installs_nothing(checkout: Path) -> None:
    for stamp in (".tools/made", ".venv/packages-default", ".venv/rustbpe-made", ".venv/project-made"):
        (checkout / stamp).parent.mkdir(exist_ok=True)
        (checkout / stamp).touch()
    (checkout / ".venv" / "made-in").write_text(f"{checkout}\n")
    (checkout / "pyproject.toml").touch()
    for stamp in (".tools/made", ".venv/packages-default", ".venv/rustbpe-made", ".venv/project-made"):
        (checkout / stamp).touch()
    assert "pip install" not in make(checkout, "--dry-run", "setup")
    (checkout / "requirements.lock").write_text("# changed\n")
    assert "requirements.lock" in make(checkout, "--dry-run", "setup")


def test_ci_stops_at_once_where_the_test_data_is_missing(checkout: Path) -> None:
    (checkout / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci")
    result = subprocess.run([checkout / ".ci" / "run"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "needs the test data" in result.stderr
    assert result.stdout == ""
