"""Scaled dot-product attention with grouped KV heads: one interface, two ways.

Shape letters: B batch, H query heads, G KV heads, T queries, S keys, D head dimension.

torch's `scaled_dot_product_attention` is the rule. Training in bfloat16 on a CPU is the exception:
there the explicit form (baddbmm, softmax, bmm) runs on the matrix units and took half the time
(T=256, two cores with AMX).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The explicit form stores B·H·T·S scores; beyond this many keys SDPA's blockwise kernel wins.
EXPLICIT_MAX_KEYS = 1024


def attend(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BTS: Tensor | None = None) -> Tensor:
    """Softmax(q·kᵀ/√D + mask)·v, causal where no mask is given. Returns BHTD in q's dtype.

    mask_BTS: 0 = may look, -inf = may not, in q's dtype. Without a mask T must equal S, or be 1: one
    query that looks at all keys.
    """
    tokens, keys = q_BHTD.shape[2], k_BGSD.shape[2]
    assert mask_BTS is not None or tokens in (1, keys), "causal attention needs T == S or T == 1"
    explicit = (
        mask_BTS is None
        and tokens == keys
        and q_BHTD.device.type == "cpu"
        and q_BHTD.dtype == torch.bfloat16
        and keys <= EXPLICIT_MAX_KEYS
    )
    if explicit:
        return _explicit_causal(q_BHTD, k_BGSD, v_BGSD)
    grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
    if mask_BTS is None:
        return F.scaled_dot_product_attention(
            q_BHTD, k_BGSD, v_BGSD, is_causal=tokens > 1, enable_gqa=grouped
        )
    return F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, attn_mask=mask_BTS[:, None], enable_gqa=grouped
    )


def _explicit_causal(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    B, H, T, D = q_BHTD.shape
    groups = H // k_BGSD.shape[1]
    if groups > 1:
        k_BGSD = k_BGSD.repeat_interleave(groups, dim=1)
        v_BGSD = v_BGSD.repeat_interleave(groups, dim=1)
    bias_TT = torch.full((T, T), -math.inf, dtype=q_BHTD.dtype, device=q_BHTD.device).triu_(1)
    scores = torch.baddbmm(
        bias_TT.expand(B * H, T, T),
        q_BHTD.reshape(B * H, T, D),
        k_BGSD.reshape(B * H, T, D).transpose(1, 2),
        alpha=D**-0.5,
    )
    return torch.bmm(scores.softmax(dim=-1), v_BGSD.reshape(B * H, T, D)).view(B, H, T, D)
