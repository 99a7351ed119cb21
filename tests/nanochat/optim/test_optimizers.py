"""Muon's update, who learns at which rate, and state that survives."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat.model.gpt import GPT
from nanochat.optim.groups import Optimizers
from nanochat.optim.muon import orthogonalize
from nanochat.recipes import Model, Optimizer, Schedule

CONFIG = Model(depth=2, width=16, heads=2, kv_heads=1, context=8)
FP32 = Optimizer(muon_newton_schulz_dtype="float32", grad_clip=None)


def make(optimizer: Optimizer = FP32, steps: int = 10) -> tuple[GPT, Optimizers]:
    model = GPT(CONFIG, 32)
    model.init_weights(0)
    return model, Optimizers(model, optimizer, Schedule(warmdown=0.0), steps)


def fill_gradients(model: GPT, optimizers: Optimizers, seed: int, scale: float = 1.0) -> None:
    optimizers.gradients.copy_(
        torch.randn(optimizers.gradients.shape, generator=torch.Generator().manual_seed(seed)) * scale
    )


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_newton_schulz_pushes_singular_values_towards_one(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalize(stack, torch.float32)
    assert update.shape == stack.shape
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    alignment = (update * (u @ v)).sum((1, 2)) / (update.norm(dim=(1, 2)) * math.sqrt(min(shape)))
    assert alignment.min() > 0.97


def test_a_stack_is_updated_as_its_matrices_one_by_one_would_be() -> None:
    stack = torch.randn(4, 24, 8, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([orthogonalize(matrix[None], torch.float32) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack, torch.float32), alone, rtol=1e-4, atol=1e-5)


def test_first_muon_step_moves_a_matrix_by_its_rate_and_shape() -> None:
    model, optimizers = make()
    before = model.get_parameter("blocks.0.mlp.c_fc.weight").detach().clone()
    fill_gradients(model, optimizers, seed=2)
    gradient = model.get_parameter("blocks.0.mlp.c_fc.weight").grad
    assert gradient is not None
    # Nesterov: (1 - m)·g into the buffer, then the mean of gradient and buffer. Both lie along g.
    expected = orthogonalize(gradient[None], torch.float32)[0] * -0.02 * math.sqrt(64 / 16)
    optimizers.step(0)
    moved = model.get_parameter("blocks.0.mlp.c_fc.weight").detach() - before
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_tables_learn_at_adamw_rates_scaled_by_width() -> None:
    model, optimizers = make(Optimizer(lr_factor=0.5, muon_newton_schulz_dtype="float32", grad_clip=None))
    before = {name: model.get_parameter(name).detach().clone() for name in ("wte.weight", "lm_head.weight")}
    fill_gradients(model, optimizers, seed=3)
    optimizers.step(0)
    # The first AdamW step is the rate times the gradient's sign.
    for name, rate in (("wte.weight", 0.2), ("lm_head.weight", 0.004)):
        moved = (model.get_parameter(name).detach() - before[name]).abs()
        expected = torch.full_like(moved, 0.5 * rate * (16 / 768) ** -0.5)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)


def test_state_carried_over_by_name_makes_the_same_next_step() -> None:
    model, optimizers = make()
    for step in range(3):
        fill_gradients(model, optimizers, seed=step)
        optimizers.step(step)
    twin, twin_optimizers = make()
    twin.load_state_dict(model.state_dict())
    twin_optimizers.load_state_tensors({k: v.clone() for k, v in optimizers.state_tensors().items()})
    for gpt, both in ((model, optimizers), (twin, twin_optimizers)):
        fill_gradients(gpt, both, seed=9)
        both.step(3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_state_of_another_model_is_refused_by_name() -> None:
    _, optimizers = make()
    state = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    del state["adamw.exp_avg.wte.weight"]
    state["muon.momentum.blocks.0.attn.c_q.weight"] = torch.zeros(3, 3)
    wrong = r"missing adamw\.exp_avg\.wte\.weight.*c_q\.weight is \(3, 3\), not \(16, 16\)"
    with pytest.raises(ValueError, match=wrong):
        optimizers.load_state_tensors(state)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    model, optimizers = make(Optimizer(grad_clip=1.0, muon_newton_schulz_dtype="float32"))
    fill_gradients(model, optimizers, seed=4, scale=10.0)
    norm = float(optimizers.gradients.norm())
    assert optimizers.step(0) == pytest.approx(norm, rel=1e-5)
    assert float(optimizers.gradients.norm()) == pytest.approx(1.0, rel=1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    model, optimizers = make()
    before = model.wte.weight.detach().clone()
    optimizers.gradients[5] = math.nan
    with pytest.raises(FloatingPointError, match="gradient of step 4 is nan"):
        optimizers.step(3)
    assert torch.equal(model.wte.weight, before)


def test_backward_writes_into_the_one_buffer() -> None:
    model, optimizers = make()
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model.loss_sum(ids[:, :-1], ids[:, 1:], torch.ones(2, 8)).backward()
    head = model.lm_head.weight.grad
    assert head is not None
    assert head.any()
    assert head.untyped_storage().data_ptr() == optimizers.gradients.untyped_storage().data_ptr()
    optimizers.zero_grad()
    assert not head.any()


def test_the_rates_that_are_told_are_those_that_the_optimizers_use() -> None:
    """Halfway down to 0, at a quarter of the recipe's rates; AdamW's grow with (width / 768)^-0.5."""
    model = GPT(CONFIG, 32)
    model.init_weights(0)
    config = Optimizer(lr_factor=0.25)
    optimizers = Optimizers(model, config, Schedule(warmdown=1.0), 10, torch.float32)
    fill_gradients(model, optimizers, 0)
    optimizers.step(5)
    narrow = (16 / 768) ** -0.5
    assert optimizers.rates(5) == pytest.approx(
        {
            "lr_multiplier": 0.5,
            "matrix_lr": 0.02 * 0.125,
            "embedding_lr": 0.2 * 0.125 * narrow,
            "unembedding_lr": 0.004 * 0.125 * narrow,
        }
    )
    used = [group["lr"] for group in optimizers._adamw._adamw.param_groups]
    assert used == [optimizers.rates(5)["embedding_lr"], optimizers.rates(5)["unembedding_lr"]]
