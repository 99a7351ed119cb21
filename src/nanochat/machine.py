"""What this machine can do: cores, memory, GPUs, and how fast it trains.

The estimate is for plans and guards, not for benchmarks. On a CPU a matrix product in float32 is
timed for a fifth of a second; a GPU goes by its data sheet. Training is taken to reach a fixed share
of either.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version

# Training is taken to reach this share of the float32 matrix product's rate on CPUs: with bf16
# products on AMX the quick model reaches about all of it, in float32 about half.
CPU_SHARE = 0.8
# Model FLOPs utilisation of training on a GPU, of its dense bf16 peak (50.9 % is what nanochat's
# d32 run reached on 8 H100s, its run1000.sh).
GPU_SHARE = 0.4

# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; the first that
# occurs counts, so longer names come first.
PEAK_BF16_FLOPS = {
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A40": 150e12,
    "L4": 121e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# What a GPU counts for in estimates whose name is not in the table: the slowest that is.
UNKNOWN_GPU_FLOPS = min(PEAK_BF16_FLOPS.values())


def peak_bf16_flops(gpu: str) -> float | None:
    """FLOP/s of a GPU of that name at its best in dense bf16, where known."""
    # Whole words: an RTX A4000 is no A40.
    return next((flops for part, flops in PEAK_BF16_FLOPS.items() if re.search(rf"\b{part}\b", gpu)), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as nvidia-smi names it, and its memory."""

    name: str
    memory_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """This machine. cpu_flops_per_s: what a training step gets out of its CPU in all."""

    host: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    cpu_flops_per_s: float

    def processes(self, gpus: int) -> int:
        """Training processes for a recipe that asks for `gpus`: one on each GPU there is, up to so
        many; one on a CPU."""
        return max(1, min(gpus, len(self.gpus)))

    def training_flops_per_s(self, gpus: int) -> float:
        """What a training step gets out of up to `gpus` GPUs, or of the CPU where there is none."""
        used = self.gpus[:gpus]
        peaks = [peak_bf16_flops(gpu.name) or UNKNOWN_GPU_FLOPS for gpu in used]
        return GPU_SHARE * sum(peaks) if peaks else self.cpu_flops_per_s

    def training_memory_bytes(self) -> int:
        """Memory that one training process has."""
        return min((gpu.memory_bytes for gpu in self.gpus), default=self.memory_bytes)

    def describe(self, gpus: int) -> str:
        """``host (2 cores)``, or ``host (2 x NVIDIA L4)`` for the GPUs that would be used."""
        used = self.gpus[:gpus]
        return f"{self.host} ({f'{len(used)} x {used[0].name}' if used else f'{self.cores} cores'})"


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would take on a CPU: CXX, else the first that is there."""
    named = os.environ.get("CXX")
    found = map(shutil.which, [named] if named else ["g++", "clang++", "c++"])
    return next(filter(None, found), None)


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


@functools.cache
def this_machine() -> Machine:
    import psutil

    return Machine(
        host=platform.node(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        gpus=_usable_gpus(),
        cpu_flops_per_s=CPU_SHARE * _matmul_flops_per_s(),
    )


def _usable_gpus() -> tuple[Gpu, ...]:
    """The GPUs that training would see. Asks neither torch (which takes seconds to load) nor CUDA: a
    CPU-only build of torch is told by its version, and CUDA_VISIBLE_DEVICES is read as CUDA reads it."""
    if version("torch").endswith("+cpu"):
        return ()
    gpus = [
        Gpu(name=name, memory_bytes=int(float(mib) * 2**20))
        for name, mib in _ask_nvidia_smi("name,memory.total") or ()
        if mib.replace(".", "", 1).isdigit()
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpus)
    chosen = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if all(entry.isdigit() for entry in chosen):
        return tuple(gpus[int(entry)] for entry in chosen if int(entry) < len(gpus))
    return tuple(gpus[: len(chosen)])  # by UUID; machines with GPUs of several kinds are rare


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
    rows = _ask_nvidia_smi("utilization.gpu,memory.used")
    try:
        numbers = [(float(used_percent), float(mib)) for used_percent, mib in rows or ()]
    except ValueError:  # "[N/A]": a GPU that does not tell
        return None
    if not numbers:
        return None
    return {
        "gpu_utilisation": sum(percent for percent, _ in numbers) / len(numbers),
        "gpu_memory_bytes": sum(mib for _, mib in numbers) * 2**20,
    }


def driver_cuda() -> str | None:
    """The newest CUDA version that the GPU driver supports (``12.8``); None where it does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        answer = subprocess.run([program], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"CUDA Version: *(\d+\.\d+)", answer)
    return found[1] if found else None


def _ask_nvidia_smi(fields: str) -> list[list[str]] | None:
    """A row of `fields` for each GPU; None where there is no nvidia-smi or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [row for row in rows if len(row) == len(fields.split(","))]
