"""AdamW for the embedding and the head: torch's fused one, with its state as named tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanochat.recipes import Optimizer


class AdamW:
    """Loshchilov & Hutter 2019, arXiv:1711.05101. `parameters`: (name, table, name of its learning
    rate, that rate before the stage's factor).

    lrs: the rates by name where the schedule's multiplier is 1.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter, str, float]], config: Optimizer) -> None:
        self._parameters = [(name, parameter) for name, parameter, _, _ in parameters]
        self.lrs = {rate: lr * config.lr_factor for _, _, rate, lr in parameters}
        self._adamw = torch.optim.AdamW(
            [{"params": [parameter], "lr": lr} for _, parameter, _, lr in parameters],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for _, parameter in self._parameters:  # made now, so that a checkpoint finds where to load
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, lr_multiplier: float) -> None:
        for group, lr in zip(self._adamw.param_groups, self.lrs.values(), strict=True):
            group["lr"] = lr * lr_multiplier
        self._adamw.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by name (the live tensors)."""
        return {
            f"adamw.{kind}.{name}": tensor
            for name, parameter in self._parameters
            for kind, tensor in self._adamw.state[parameter].items()
        }
