"""How this machine trains: device, precision, compilation, threads. None of it changes what is trained."""

from __future__ import annotations

import dataclasses
import os
from functools import cache
from pathlib import Path

import torch

from nanochat.machine import cpp_compiler, peak_bf16_flops, peak_memory_bytes
from nanochat.model.gpt import GPT, Block
from nanochat.training.bad_input import BadInput
from nanochat.training.job import JobHardware

# Compiling a block takes 15-27 s (two cores, nothing cached) and then saves a third of a bf16 step,
# a tenth of an fp32 one: it pays from about this much work, counted in training FLOPs. It is a
# property of the whole run, so a resumed run decides as the first one did.
COMPILE_PAYS_FLOPS = {torch.bfloat16: 1.2e13, torch.float32: 2e13}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """The choices for one run, and the sentences that explain them."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    notes: tuple[str, ...] = ()

    @property
    def newton_schulz_dtype(self) -> torch.dtype | None:
        """fp32 on processors for which bfloat16 products are many times slower, else the recipe's."""
        return torch.float32 if self.device.type == "cpu" and not cpu_has_fast_bf16() else None

    def prepare(self, model: GPT) -> GPT:
        """Move the model here and set the dtype of its activations."""
        model.to(self.device)
        model.compute_dtype = self.dtype if self.dtype != torch.float32 else None
        return model

    def compile_blocks(self, model: GPT, rows: int, tokens: int) -> str | None:
        """Compile the blocks for training steps of one shape, by a trial step that changes no weight.

        Block by block, because the whole model takes far longer to compile and gains nothing. Returns
        why it failed, and then the model trains as it is.
        """
        model.training_block = torch.compile(Block.forward, dynamic=False)
        ids_BT = torch.zeros((rows, tokens), dtype=torch.long, device=self.device)
        try:
            model.train().loss_sum(ids_BT, ids_BT, torch.zeros(ids_BT.shape, device=self.device)).backward()
        except Exception as error:  # compilers fail in many ways, and none of them must stop a training
            model.training_block = None
            reason = str(error).partition("\n")[0]
            return f"{type(error).__name__}: {reason:.200}"
        return None

    def peak_flops(self) -> float | None:
        """FLOP/s of the device at its best in bf16, where known."""
        if self.device.type != "cuda":
            return None
        return peak_bf16_flops(torch.cuda.get_device_name(self.device))

    def memory_bytes(self) -> int:
        """Device memory at its fullest on a GPU, this process's memory now on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        statm = Path("/proc/self/statm")
        if statm.exists():
            return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return peak_memory_bytes()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_device(hardware: JobHardware, local_rank: int | None = None) -> torch.device:
    """Raises BadInput where the device asked for is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = hardware.device
    if kind == "auto":
        # Several processes on one Apple GPU have no collectives; there, processes mean CPU.
        apple = available["mps"] and hardware.processes == 1
        kind = "cuda" if available["cuda"] else "mps" if apple else "cpu"
    if not available[kind]:
        raise BadInput(f"device {kind!r} was asked for, but torch sees none here; use 'auto' or 'cpu'")
    if kind != "cuda":
        return torch.device(kind)
    rank = int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
    if rank >= torch.cuda.device_count():
        raise BadInput(
            f"process {rank} has no GPU of its own: {hardware.processes} processes, "
            f"{torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", rank)


def choose_runtime(hardware: JobHardware, device: torch.device, flops: float, fixed_shapes: bool) -> Runtime:
    """`flops`: of the whole run on one process. `fixed_shapes`: whether all its steps have one shape."""
    notes: list[str] = []
    dtype = _dtype(hardware, device, notes)
    compile = _compile(hardware, device, dtype, flops, fixed_shapes, notes)
    torch.set_num_threads(hardware.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    threads = f", {hardware.threads} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    summary = f"training on {name}{threads} in {str(dtype).removeprefix('torch.')}"
    return Runtime(device=device, dtype=dtype, compile=compile, notes=(summary, *notes))


def _dtype(hardware: JobHardware, device: torch.device, notes: list[str]) -> torch.dtype:
    if hardware.precision != "auto":
        return torch.float32 if hardware.precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and cpu_has_fast_bf16():
        return torch.bfloat16
    if device.type == "cpu":
        notes.append("this processor has no fast bfloat16: float32, about half the speed and the same model")
    return torch.float32


def _compile(
    hardware: JobHardware,
    device: torch.device,
    dtype: torch.dtype,
    flops: float,
    fixed_shapes: bool,
    notes: list[str],
) -> bool:
    if hardware.compile == "off":
        return False
    if device.type == "cpu" and not has_cpp_compiler():
        notes.append("no C++ compiler found (g++, clang++): training without torch.compile, which is slower")
        return False
    if hardware.compile == "on":
        return True
    if device.type == "mps" or not fixed_shapes:
        return False
    return device.type == "cuda" or flops >= COMPILE_PAYS_FLOPS[dtype]


@cache
def cpu_has_fast_bf16() -> bool:
    """Whether the processor multiplies bfloat16 natively (AMX or AVX-512 BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def has_cpp_compiler() -> bool:
    """Whether torch.compile has what it needs on a CPU."""
    return cpp_compiler() is not None
