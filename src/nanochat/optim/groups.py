"""Which parameter learns how: Muon for the blocks' matrices, AdamW for embedding and head."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nanochat.model.gpt import GPT
from nanochat.optim.adamw import AdamW
from nanochat.optim.muon import Muon
from nanochat.optim.schedule import lr_multiplier, muon_momentum
from nanochat.recipes import Optimizer, Schedule

# Width at which the recipes' AdamW rates are stated; others are scaled by (width / 768)^-0.5.
REFERENCE_WIDTH = 768


class Optimizers:
    """Both optimizers of a model, their schedule, and one flat buffer that holds every gradient.

    Each parameter's `.grad` is a view of the buffer, so that summing gradients over processes is
    one collective call and zeroing them is one write.

    newton_schulz_dtype: where the machine cannot do the recipe's quickly (None: the recipe's).
    """

    def __init__(
        self,
        model: GPT,
        config: Optimizer,
        schedule: Schedule,
        steps: int,
        newton_schulz_dtype: torch.dtype | None = None,
    ) -> None:
        self._config, self._schedule, self._steps = config, schedule, steps
        named = dict(model.named_parameters())
        tables = {"wte.weight": "embedding_lr", "lm_head.weight": "unembedding_lr"}
        width_factor = (model.config.width / REFERENCE_WIDTH) ** -0.5
        dtype = newton_schulz_dtype or getattr(torch, config.muon_newton_schulz_dtype)
        self._muon = Muon([(name, p) for name, p in named.items() if name not in tables], config, dtype)
        self._adamw = AdamW(
            [
                (name, named[name], rate, getattr(config, rate) * width_factor)
                for name, rate in tables.items()
            ],
            config,
        )
        self._parameters = list(named.values())
        self.gradients = torch.zeros(
            sum(parameter.numel() for parameter in self._parameters), device=model.device
        )
        self._attach()

    def _attach(self) -> None:
        offset = 0
        for parameter in self._parameters:
            end = offset + parameter.numel()
            parameter.grad = self.gradients[offset:end].view_as(parameter)
            offset = end

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def lr_multiplier(self, step: int) -> float:
        """The schedule's factor in step `step` (0 …)."""
        return lr_multiplier(self._schedule, step, self._steps)

    def rates(self, step: int) -> dict[str, float]:
        """What step `step` (0 …) learns at: the schedule's factor, and the rates that come of it."""
        multiplier = self.lr_multiplier(step)
        rates = {"matrix_lr": self._muon.lr, **self._adamw.lrs}
        return {"lr_multiplier": multiplier, **{name: multiplier * rate for name, rate in rates.items()}}

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Clip, update every parameter, and return the gradient's global norm before clipping.

        Raises FloatingPointError when the norm is not finite: the weights are still those before.
        """
        norm = float(torch.linalg.vector_norm(self.gradients))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of step {step + 1} is {norm}: training diverged. The last checkpoint is from "
                "before; lower the learning rates (optimizer.lr_factor) or set optimizer.grad_clip"
            )
        clip = self._config.grad_clip
        if clip is not None and norm > clip:
            self.gradients.mul_(clip / norm)
        multiplier = self.lr_multiplier(step)
        self._muon.step(multiplier, muon_momentum(self._config, step))
        self._adamw.step(multiplier)
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that must be kept for a later step to be the same: named tensors, live."""
        return {**self._muon.state_tensors(), **self._adamw.state_tensors()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError naming what is missing, unknown or of another shape."""
        own = self.state_tensors()
        problems = [f"missing {name}" for name in own.keys() - tensors.keys()]
        problems += [f"unknown {name}" for name in tensors.keys() - own.keys()]
        problems += [
            f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if tensors[name].shape != own[name].shape
        ]
        if problems:
            raise ValueError("optimizer state does not fit the model: " + "; ".join(sorted(problems)[:8]))
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
