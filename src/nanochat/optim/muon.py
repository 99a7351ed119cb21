"""Muon: momentum, orthogonalised, for the matrices between embedding and head.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: the update is the (Nesterov)
momentum matrix with its singular values pushed towards 1 by five Newton–Schulz steps. All matrices
of one shape go through as one stack, so a layer more costs a larger product, not more launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanochat.recipes import Optimizer

# Quintic coefficients chosen for slope at zero; singular values end in about [0.7, 1.2] (ibid.).
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(g_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix to each of the stack's, roughly, computed in `dtype`."""
    a, b, c = QUINTIC
    x = g_NRC.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix of the shorter side is the cheaper one
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """One momentum stack for each shape among `parameters`, which are (name, matrix) pairs.

    lr: the rate where the schedule's multiplier is 1.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        config: Optimizer,
        newton_schulz_dtype: torch.dtype,
    ) -> None:
        self.lr = config.matrix_lr * config.lr_factor
        self._dtype = newton_schulz_dtype
        self._groups: dict[tuple[int, int], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in parameters:
            rows, columns = parameter.shape
            self._groups.setdefault((rows, columns), []).append((name, parameter))
        self._momentum = {
            shape: torch.zeros((len(group), *shape), device=group[0][1].device)
            for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float) -> None:
        """Update every matrix from its `.grad`."""
        for (rows, columns), group in self._groups.items():
            buffer = self._momentum[rows, columns]
            grads = torch.stack([_grad(parameter) for _, parameter in group])
            buffer.lerp_(grads, 1.0 - momentum)
            update = orthogonalize(grads.lerp_(buffer, momentum), self._dtype).to(buffer.dtype)
            scale = self.lr * lr_multiplier * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_([parameter for _, parameter in group], list(update.unbind()), alpha=-scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """The momentum of each matrix by name (views of the stacks)."""
        return {
            f"muon.momentum.{name}": self._momentum[shape][index]
            for shape, group in self._groups.items()
            for index, (name, _) in enumerate(group)
        }


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "a step without a gradient"
    return parameter.grad
