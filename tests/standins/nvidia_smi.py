"""A program that answers as nvidia-smi does, for machines that have no GPU."""

from __future__ import annotations

from pathlib import Path

_SCRIPT = """#!/bin/sh
case "$*" in
  *memory.total*) answer="{name}, {memory_mib}" ;;
  *utilization.gpu*) answer="0, 1024" ;;
  *) echo "| NVIDIA-SMI 575.57.08    Driver Version: 575.57.08    CUDA Version: {cuda} |"; exit ;;
esac
for gpu in $(seq {count}); do echo "$answer"; done
"""


def write(
    folder: Path, *, count: int = 1, name: str = "NVIDIA L40S", memory_gib: int = 45, cuda: str = "13.2"
) -> Path:
    """The folder to put first into the PATH. memory_gib: of each GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(_SCRIPT.format(count=count, name=name, memory_mib=1024 * memory_gib, cuda=cuda))
    program.chmod(0o755)
    return folder
