"""Our tensors under NanoChat's names. Norms have no weights, so 6 a layer and 2 are all there are."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nanochat.huggingface.config import ExportError

_OUTSIDE = {"wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
_INSIDE = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


def converted(tensors: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Every tensor under its new name, as stored (fp32), on the CPU; nothing is left out.

    vocab_size: rows of the embedding and the head; what the model has beyond only pads it.
    Raises ExportError naming the tensors that NanoChat has no place for.
    """
    names = {name: _renamed(name) for name in tensors}
    unknown = [name for name, other in names.items() if other is None]
    if unknown:
        raise ExportError(f"the NanoChat of transformers has no place for {', '.join(sorted(unknown))}")
    return {
        other: (tensor[:vocab_size] if name in _OUTSIDE else tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if (other := names[name])
    }


def _renamed(name: str) -> str | None:
    found = _BLOCK.fullmatch(name)
    if found is None:
        return _OUTSIDE.get(name)
    layer, matrix = found.groups()
    return f"model.layers.{layer}.{_INSIDE[matrix]}.weight" if matrix in _INSIDE else None
