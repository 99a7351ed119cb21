"""What a machine tells of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.machine import gpu_usage, this_machine


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_gpu_usage_is_the_mean_utilisation_and_all_memory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo '90, 1024'; echo '50, 2048'", monkeypatch)
    assert gpu_usage() == {"gpu_utilisation": 70.0, "gpu_memory_bytes": 3072 * 2**20}


@pytest.mark.parametrize("script", ["exit 9", "echo '[N/A], 12'", "true"])
def test_a_gpu_that_does_not_answer_is_no_usage(
    script: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, script, monkeypatch)
    assert gpu_usage() is None


def test_a_machine_without_nvidia_smi_has_no_usage(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_usage() is None


def test_this_machine_has_cores_memory_and_a_rate() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 2**28
    assert machine.training_flops_per_s > 1e8
