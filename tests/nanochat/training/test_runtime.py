"""What a machine is asked to do, and what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nanochat.model.gpt import GPT
from nanochat.recipes import Model
from nanochat.training import runtime
from nanochat.training.job import JobHardware
from nanochat.training.runtime import choose_device, choose_runtime

CPU = torch.device("cpu")


def choose(flops: float = 1e18, fixed_shapes: bool = True, **hardware: object) -> runtime.Runtime:
    settings = {"threads": torch.get_num_threads(), **hardware}
    return choose_runtime(JobHardware(**settings), CPU, flops, fixed_shapes)


def test_a_processor_without_fast_bfloat16_trains_in_float32_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "cpu_has_fast_bf16", lambda: False)
    chosen = choose(compile="off")
    assert chosen.dtype == torch.float32
    assert chosen.newton_schulz_dtype == torch.float32
    assert any("no fast bfloat16" in note for note in chosen.notes)
    monkeypatch.setattr(runtime, "cpu_has_fast_bf16", lambda: True)
    assert choose(compile="off").dtype == torch.bfloat16
    assert choose(compile="off").newton_schulz_dtype is None
    assert choose(compile="off", precision="float32").dtype == torch.float32


def test_without_a_cpp_compiler_it_trains_without_torch_compile_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    chosen = choose(compile="on")
    assert not chosen.compile
    assert any("no C++ compiler found" in note for note in chosen.notes)


def test_only_long_runs_of_one_shape_are_compiled_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_cpp_compiler", lambda: True)
    assert choose(flops=1e18).compile
    assert not choose(flops=1e9).compile
    assert not choose(flops=1e18, fixed_shapes=False).compile
    assert choose(flops=1e9, compile="on").compile
    assert not choose(flops=1e18, compile="off").compile


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' was asked for, but torch sees none here"):
        choose_device(JobHardware(device="cuda"))
    assert choose_device(JobHardware(device="cpu")).type == "cpu"


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 has no GPU of its own: 3 processes, 2 GPUs"):
        choose_device(JobHardware(device="cuda", processes=3), local_rank=2)


def test_a_compiled_block_trains_as_the_plain_one() -> None:
    if not runtime.has_cpp_compiler():
        pytest.skip("no C++ compiler on this machine")
    config = Model(depth=2, width=16, heads=2, kv_heads=1, context=16)
    ids = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compile in ("off", "on"):
        model = GPT(config, 40)
        model.init_weights(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05
        chosen = choose(compile=compile, precision="float32")
        chosen.prepare(model).train()
        if chosen.compile:
            assert chosen.compile_blocks(model, rows=4, tokens=16) is None
            model.zero_grad()
        loss = model.loss_sum(ids[:, :-1], ids[:, 1:], torch.ones(4, 16) / 64)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)


def test_a_compiler_that_fails_leaves_a_model_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **settings: object) -> object:
        def fail(*arguments: object) -> object:
            raise RuntimeError("g++: internal compiler error")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    model = GPT(Model(depth=1, width=16, heads=2, kv_heads=1, context=16), 40)
    assert choose(compile="on").compile_blocks(model, 2, 8) == "RuntimeError: g++: internal compiler error"
    ids = torch.zeros(2, 9, dtype=torch.long)
    model.loss_sum(ids[:, :-1], ids[:, 1:], torch.ones(2, 8)).backward()


def test_memory_is_measured() -> None:
    assert choose(compile="off").memory_bytes() > 10_000_000


def test_the_process_is_tuned_without_loading_torch() -> None:
    program = (
        "import sys; from nanochat.training.process import tune_process; tune_process();"
        "import os; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.split()[0] == "False"
    if sys.platform == "linux":
        assert output.split()[1].isdigit()
