"""What this machine can do: cores, memory, disk, and how fast it trains, measured in a moment.

The estimate is for plans and guards, not for benchmarks: a matrix product in float32 is timed for
a fifth of a second, and training is taken to reach a fixed share of it. Where a stage of the same
shape has run here before, its own receipt is the better source (see `nanochat.plan`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shutil
import subprocess
import time

# Training reaches about this share of the float32 matrix product's rate on CPUs: the quick model
# at 40k tokens/s is 0.26 TFLOP/s beside 0.25–0.33 TFLOP/s measured for sgemm with two cores
# (bf16 matrices, fp32 everything else). Larger models do better.
CPU_SHARE = 0.8
# Model FLOPs utilisation of training on a GPU, of its dense bf16 peak (50.9 % is what nanochat's
# d32 run reached on 8 H100s, its run1000.sh).
GPU_SHARE = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """`training_flops_per_s`: what a training step gets out of the machine in all."""

    name: str
    cores: int
    memory_bytes: int
    gpus: int
    training_flops_per_s: float


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def this_machine() -> Machine:
    import psutil

    cores = usable_cores()
    return Machine(
        name=f"{platform.node()} ({cores} cores)",
        cores=cores,
        memory_bytes=psutil.virtual_memory().total,
        gpus=0,
        training_flops_per_s=CPU_SHARE * _matmul_flops_per_s(),
    )


def _matmul_flops_per_s(size: int = 1024, for_s: float = 0.2) -> float:
    import numpy as np

    a = np.ones((size, size), dtype=np.float32)
    a @ a
    best = 0.0
    end = time.perf_counter() + for_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def gpu_usage() -> dict[str, float] | None:
    """`gpu_utilisation` (percent, mean over GPUs) and `gpu_memory_bytes` (in use, all GPUs) as
    nvidia-smi tells them; None where there is no such GPU or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
        rows = [[float(cell) for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    if not rows:
        return None
    return {
        "gpu_utilisation": sum(row[0] for row in rows) / len(rows),
        "gpu_memory_bytes": sum(row[1] for row in rows) * 2**20,
    }
