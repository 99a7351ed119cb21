"""The tokenizer as `transformers` loads it: tokenizer.json, tokenizer_config.json, chat_template.jinja.

In a chat template text and special tokens are one string, so what a user types as `<|user_end|>` would
become the token. Here the template puts GUARD into every `<|` of a message, so that it is not found as a
special token, and the tokenizer's normalizer takes GUARD out of what is left: the ids are those of our
own rendering. GUARD is a noncharacter of Unicode; a text that has it loses it.

Outside the template (`tokenizer("<|bos|>")`) the names are tokens, as everywhere in `transformers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.huggingface.config import PAD_TOKEN, end_token
from nanochat.recipes import SPECIAL_TOKENS

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

GUARD = "\ufdd0"

# What nanochat.rendering does, its refusals included. A part begins with GUARD: the end of the one before
# it must not make a special token with its start.
_TEMPLATE = r"""
{%- set markers = {
  'python': ('<|python_start|>', '<|python_end|>'),
  'python_output': ('<|output_start|>', '<|output_end|>'),
} -%}

{%- macro guarded(text) -%}
  {{- '\ufdd0' ~ text | replace('<|', '<\ufdd0|') -}}
{%- endmacro -%}

{%- macro content_of(message) -%}
  {%- if message.content is string -%}
    {{- guarded(message.content) -}}
  {%- elif message.content is sequence -%}
    {%- for part in message.content -%}
      {%- if part.type == 'text' -%}
        {{- guarded(part.text) -}}
      {%- elif part.type in markers and message.role == 'assistant' -%}
        {{- markers[part.type][0] ~ guarded(part.text) ~ markers[part.type][1] -}}
      {%- else -%}
        {{- raise_exception('a part of type ' ~ part.type ~ ' in a message of the ' ~ message.role) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- else -%}
    {{- raise_exception('a message of the ' ~ message.role ~ ' has no text') -}}
  {%- endif -%}
{%- endmacro -%}

{%- set offset = 1 if messages and messages[0].role == 'system' else 0 -%}
{%- if messages | length == offset -%}
  {{- raise_exception('a conversation needs at least one user message') -}}
{%- endif -%}

{{- '<|bos|>' -}}
{%- for message in messages[offset:] -%}
  {%- set due = 'user' if loop.index0 is even else 'assistant' -%}
  {%- if message.role != due -%}
    {{- raise_exception('role ' ~ message.role ~ ' where ' ~ due ~ ' is due') -}}
  {%- endif -%}
  {{- '<|' ~ due ~ '_start|>' -}}
  {%- if loop.first and offset -%}
    {{- content_of(messages[0]) ~ '\n\n' -}}
  {%- endif -%}
  {{- content_of(message) ~ '<|' ~ due ~ '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, context: int, chat: bool) -> None:
    """Write the files into `folder`; without a chat template where the model is no chat model.

    Text that is no chat gets `<|bos|>` before it. context: in tokens.
    """
    import rustbpe

    path = folder / TOKENIZER
    ranks = [(spelling, token) for token, spelling in enumerate(tokenizer.ranks)]
    rustbpe.Tokenizer.from_ranks(ranks, tokenizer.pattern, tokenizer.special_tokens).to_huggingface(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}
    document["post_processor"] = _bos_before_text(tokenizer.bos)
    _write_json(path, document)
    named = {"bos_token": "<|bos|>", "eos_token": end_token(chat=chat), "pad_token": PAD_TOKEN}
    _write_json(
        folder / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "extra_special_tokens": [name for name in SPECIAL_TOKENS if name not in named.values()],
            "model_max_length": context,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    )
    if chat:
        (folder / CHAT_TEMPLATE).write_text(_TEMPLATE.strip() + "\n", encoding="utf-8")


def _bos_before_text(bos: int) -> dict[str, object]:
    special = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [bos], "tokens": ["<|bos|>"]}},
    }


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
