"""Softcapped cross-entropy of the unembedding, in chunks, with its gradient made on the way forward.

The plain form keeps N·V logits three times over (raw, capped, gradient), which for a vocabulary of
65,536 is the largest memory of the step and for a small model on a CPU most of its time. Here a
chunk of rows goes through logits, loss and gradient while it is in cache and leaves only N·D and
V·D numbers behind. (The idea of fusing head and loss: Wijmans et al. 2024, arXiv:2411.09009.)

Shape letters: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.costs import LOSS_CHUNK_LOGITS

# Capped logits lie within ±cap, so up to here e^logit and its sum cannot leave fp32's range and the
# usual subtraction of the maximum (a pass over all logits) is not needed.
EXP_SAFE_CAP = 40.0


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap): bounds the logits smoothly (Gemma 2, arXiv:2408.00118)."""
    return cap * torch.tanh(logits / cap)


def cross_entropy_sum(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, cap: float
) -> Tensor:
    """Sum over tokens of weight · -log softmax(softcap(x·headᵀ))[target], in nats, fp32 scalar.

    A weight of 0 leaves a token out of loss and gradient; its target may be anything in the
    vocabulary. Differentiable in `x_ND` and `head_VD`; matrix products run in x's dtype.
    """
    return _CrossEntropySum.apply(x_ND, head_VD, targets_N, weights_N, cap, torch.is_grad_enabled())


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        cap: float,
        with_gradient: bool,
    ) -> Tensor:
        vocab_size = head_VD.shape[0]
        w_VD = head_VD.to(x_ND.dtype)
        rows = max(1, LOSS_CHUNK_LOGITS[x_ND.device.type] // vocab_size)
        total = torch.zeros((), device=x_ND.device, dtype=torch.float32)
        if with_gradient:
            grad_x_ND = torch.empty_like(x_ND)
            grad_w_VD = torch.zeros(head_VD.shape, device=x_ND.device, dtype=torch.float32)
        for start in range(0, x_ND.shape[0], rows):
            chunk = slice(start, start + rows)
            x_CD, targets_C1, weights_C1 = x_ND[chunk], targets_N[chunk, None], weights_N[chunk, None].float()
            # tanh(l/cap) = 2·sigmoid(2·l/cap) - 1, for which CPUs have the faster kernel (by half: the
            # whole loss takes 30 ms of a step's 140 instead of 40; width 128, vocabulary 2,048).
            t_CV = F.linear(x_CD, w_VD).float().mul_(2 / cap).sigmoid_().mul_(2).sub_(1)
            z_CV = t_CV * cap
            target_C1 = z_CV.gather(1, targets_C1)
            if cap > EXP_SAFE_CAP:
                shift_C1 = z_CV.amax(dim=-1, keepdim=True)
                z_CV, target_C1 = z_CV.sub_(shift_C1), target_C1 - shift_C1
            exp_CV = z_CV.exp_()
            sum_C1 = exp_CV.sum(dim=-1, keepdim=True)
            total += ((sum_C1.log() - target_C1) * weights_C1).sum()
            if not with_gradient:
                continue
            # d/dz = weight·(softmax - onehot); through the cap: times 1 - tanh².
            p_CV = exp_CV.mul_(weights_C1 / sum_C1)
            p_CV.scatter_add_(1, targets_C1, -weights_C1)
            p_CV.addcmul_(p_CV, t_CV.square_(), value=-1)
            g_CV = p_CV.to(x_ND.dtype)
            torch.mm(g_CV, w_VD, out=grad_x_ND[chunk])
            grad_w_VD += g_CV.t() @ x_CD
        if with_gradient:
            ctx.save_for_backward(grad_x_ND, grad_w_VD.to(head_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        scale = grad_outputs[0]
        grad_x_ND, grad_w_VD = grad_x_ND * scale.to(grad_x_ND.dtype), grad_w_VD * scale.to(grad_w_VD.dtype)
        return grad_x_ND, grad_w_VD, None, None, None, None
