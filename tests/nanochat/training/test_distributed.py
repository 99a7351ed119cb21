"""The processes of a run agree on sums, each on a device of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from nanochat.training import distributed
from nanochat.training.distributed import World, join_world

RANK = """
import json, sys, torch
from pathlib import Path
from nanochat.training.distributed import join_world
with join_world(torch.device("cpu")) as world:
    sums = world.sum_numbers([1.5 + world.rank, 2**53, world.rank == 1])
    Path(sys.argv[1], f"rank-{world.rank}").write_text(json.dumps(sums))
"""


def test_one_process_keeps_its_numbers() -> None:
    assert World().sum_numbers([1, 2.5, True]) == [1.0, 2.5, 1.0]


def test_two_processes_get_the_same_sums(tmp_path: Any) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    sums = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert sums == [[4.0, 2.0**54, 1.0]] * 2


def test_a_process_on_a_gpu_chooses_it_before_it_meets_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(
        distributed.dist,
        "init_process_group",
        lambda backend, **settings: calls.append((backend, settings["device_id"])),
    )
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    gpu = torch.device("cuda", 1)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join_world(gpu))
    assert calls == [("set_device", gpu), ("nccl", gpu)]
    assert world.device == gpu
