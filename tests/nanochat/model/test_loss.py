"""The chunked loss is the plain one: value, gradients, weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat.costs import LOSS_CHUNK_LOGITS
from nanochat.model.loss import cross_entropy_sum, softcap

N, D, V = 37, 16, 53


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(seed: int = 0, scale: float = 1.0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x_ND = (torch.randn(N, D, generator=generator) * scale).requires_grad_()
    head_VD = torch.randn(V, D, generator=generator).requires_grad_()
    targets_N = torch.randint(0, V, (N,), generator=generator)
    weights_N = torch.randint(0, 3, (N,), generator=generator).float()
    return x_ND, head_VD, targets_N, weights_N


def doubled(values: Inputs) -> Inputs:
    """The same in float64, where rounding can be left out of account."""
    x_ND, head_VD, targets_N, weights_N = values
    return (
        x_ND.detach().double().requires_grad_(),
        head_VD.detach().double().requires_grad_(),
        targets_N,
        weights_N.double(),
    )


def plain(
    x_ND: torch.Tensor, head_VD: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor, cap: float
) -> torch.Tensor:
    logits = softcap(x_ND @ head_VD.T, cap)
    return (F.cross_entropy(logits, targets_N, reduction="none") * weights_N).sum()


@pytest.mark.parametrize("cap", [15.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_value_and_gradients_equal_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, cap: float, scale: float
) -> None:
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 10 * V)  # four chunks, the last one short
    ours, theirs = inputs(scale=scale), doubled(inputs(scale=scale))
    mine, other = cross_entropy_sum(*ours, cap), plain(*theirs, cap)
    torch.testing.assert_close(mine, other.float(), rtol=1e-5, atol=1e-4)
    (mine * 0.5).backward()
    (other * 0.5).backward()
    for own, exact in zip(ours[:2], theirs[:2], strict=True):
        # float32's rounding, of the largest logit: plain cross-entropy in float32 is half as far off.
        assert (own.grad - exact.grad).abs().max() < 2e-6 * exact.grad.abs().max()


def test_gradients_are_the_slope_of_the_value() -> None:
    x_ND, head_VD, targets_N, weights_N = inputs()
    cross_entropy_sum(x_ND, head_VD, targets_N, weights_N, 15.0).backward()
    assert x_ND.grad is not None
    for row, column in [(0, 3), (17, 8), (36, 15)]:
        shifted = []
        for step in (0.01, -0.01):
            moved = x_ND.detach().clone()
            moved[row, column] += step
            shifted.append(cross_entropy_sum(moved, head_VD, targets_N, weights_N, 15.0))
        slope = float((shifted[0] - shifted[1]).detach() / 0.02)
        assert slope == pytest.approx(float(x_ND.grad[row, column]), rel=2e-2, abs=2e-3)


def test_a_weight_of_zero_leaves_a_token_out_whatever_its_target() -> None:
    x_ND, head_VD, targets_N, weights_N = inputs()
    weights_N[5] = 0.0
    changed = targets_N.clone()
    changed[5] = (changed[5] + 1) % V
    first = cross_entropy_sum(x_ND, head_VD, targets_N, weights_N, 15.0)
    second = cross_entropy_sum(x_ND, head_VD, changed, weights_N, 15.0)
    assert torch.equal(first, second)
    first.backward()
    assert x_ND.grad is not None
    assert not x_ND.grad[5].any()


def test_without_gradients_the_value_is_the_same() -> None:
    x_ND, head_VD, targets_N, weights_N = inputs()
    with torch.no_grad():
        evaluated = cross_entropy_sum(x_ND, head_VD, targets_N, weights_N, 15.0)
    assert torch.equal(evaluated, cross_entropy_sum(x_ND, head_VD, targets_N, weights_N, 15.0).detach())
    assert not evaluated.requires_grad


def test_bfloat16_activations_give_nearly_the_same() -> None:
    ours, theirs = inputs(), inputs()
    mine = cross_entropy_sum(ours[0].bfloat16(), *ours[1:], 15.0)
    assert float(mine) == pytest.approx(float(plain(*theirs, 15.0)), rel=1e-2)
    mine.backward()
    assert ours[1].grad is not None
    assert ours[1].grad.dtype == torch.float32
