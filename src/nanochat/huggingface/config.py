"""What `transformers` is told of a model: config.json and generation_config.json.

Everything is written out, also where it is NanoChatConfig's default today. These defaults are not ours:
intermediate_size 8192, rms_norm_eps 1e-6, bos, eos and pad 0, 1 and 1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from nanochat.recipes import Model

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

# What of a recipe's model has a word in NanoChatConfig. A later field is refused unless it is off.
_EXPRESSIBLE = frozenset({"depth", "width", "heads", "kv_heads", "context", "rope_theta", "logit_softcap"})

# float32's epsilon, which nanochat.model.gpt.NORM_EPS is (here without torch).
RMS_NORM_EPS = 2.0**-23


class ExportError(ValueError):
    """A model that cannot be exported or pushed: why, and the next step."""


def require_expressible(model: Model) -> None:
    """Raises ExportError naming every field that is set to something NanoChat has no word for."""
    fields = [
        f"model.{field.name} = {getattr(model, field.name)!r}"
        for field in dataclasses.fields(model)
        if field.name not in _EXPRESSIBLE and getattr(model, field.name) != field.default
    ]
    if fields:
        raise ExportError(
            f"the NanoChat of transformers cannot express {', '.join(fields)}: to export a model, train it "
            "with a recipe that leaves that at its default"
        )


def model_config(model: Model, tokenizer: Tokenizer, *, chat: bool) -> dict[str, Any]:
    """config.json. chat: an answer ends with `<|assistant_end|>` (a base model's text with `<|bos|>`).

    Raises ExportError for a model that NanoChat cannot express.
    """
    require_expressible(model)
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": "float32",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": 4 * model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.context,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "final_logit_softcapping": model.logit_softcap,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.special(end_token(chat=chat)),
        "pad_token_id": tokenizer.special(PAD_TOKEN),
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: generation ends where our engine ends it."""
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.special("<|assistant_end|>"), tokenizer.bos],
        "pad_token_id": tokenizer.special(PAD_TOKEN),
    }


# Never the target of a chat's training: a trainer that masks padding then masks nothing else.
PAD_TOKEN = "<|bos|>"


def end_token(*, chat: bool) -> str:
    """The special token that an answer, or a text, ends with."""
    return "<|assistant_end|>" if chat else "<|bos|>"
