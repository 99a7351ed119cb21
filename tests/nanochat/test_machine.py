"""What a machine tells of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.machine import GPU_SHARE, Machine, gpu_usage, peak_bf16_flops, this_machine


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


def machine_anew() -> Machine:
    this_machine.cache_clear()
    try:
        return this_machine()
    finally:
        this_machine.cache_clear()


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("1", 1), ("0,1", 2), ("5", 0), ("GPU-8f3a", 1)])
def test_only_visible_gpus_count(visible: str, count: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 'NVIDIA L4, 23034'; echo 'NVIDIA L4, 23034'", monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(machine_anew().gpus) == count


def test_a_cpu_only_build_of_torch_uses_no_gpu(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 'NVIDIA L4, 23034'", monkeypatch)
    monkeypatch.setattr("nanochat.machine.version", lambda name: "2.15.0+cpu")
    machine = machine_anew()
    assert machine.gpus == ()
    assert machine.processes(8) == 1
    assert machine.training_flops_per_s(8) == machine.cpu_flops_per_s


def test_this_machine_has_cores_memory_and_a_rate() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 2**28
    assert machine.training_flops_per_s(8) > 1e8


def test_gpus_are_found_and_counted_up_to_what_a_recipe_asks_for(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = "echo 'NVIDIA H100 80GB HBM3, 81559'; echo 'NVIDIA H100 80GB HBM3, 81559'"
    nvidia_smi(tmp_path, f"{two}; echo 'NVIDIA GB10, [N/A]'", monkeypatch)
    machine = machine_anew()
    assert machine.processes(1) == 1
    assert machine.processes(8) == 2
    assert machine.training_flops_per_s(1) == pytest.approx(GPU_SHARE * 989e12)
    assert machine.training_flops_per_s(8) == pytest.approx(2 * GPU_SHARE * 989e12)
    assert machine.training_memory_bytes() == 81559 * 2**20
    assert machine.describe(8).endswith("(2 x NVIDIA H100 80GB HBM3)")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA RTX A4000", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpus_peak_goes_by_its_name(name: str, flops: float | None) -> None:
    assert peak_bf16_flops(name) == flops
