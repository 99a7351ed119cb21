"""A random model that calls the calculator by itself, and the plainest way to generate with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.inference.calculator import Calculator, Result
from nanochat.inference.tools import ToolCall
from nanochat.model.gpt import GPT
from nanochat.recipes import SPECIAL_TOKENS, Model
from nanochat.tokenizer import Tokenizer

CONTEXT = 48


class BiasedModel(GPT):
    """A random model that likes digits, signs and calculator calls, so that calls happen by themselves."""

    def __init__(self, tokenizer: Tokenizer, seed: int, kv_heads: int) -> None:
        config = Model(depth=2, width=32, heads=4, kv_heads=kv_heads, context=CONTEXT)
        super().__init__(config, tokenizer.vocab_size)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6
        self.bias_V = torch.full((tokenizer.vocab_size,), -15.0)
        for text in "1234567890+-*/(":
            self.bias_V[tokenizer.encode(text)[0]] = 0.0
        for name, bias in (("<|python_start|>", 1.0), ("<|python_end|>", 4.0), ("<|assistant_end|>", -1.0)):
            self.bias_V[tokenizer.special(name)] = bias

    def forward(self, *args: Tensor, **options: object) -> Tensor:
        return super().forward(*args, **options) + self.bias_V  # type: ignore[arg-type]


def naive(
    model: GPT,
    tokenizer: Tokenizer,
    calculator: Calculator,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
) -> list[tuple[tuple[int, ...], tuple[ToolCall, ...]]]:
    """Greedy generation that reads everything anew for each token, without a cache: ids and calls."""
    rows = [_Row(tokenizer, calculator, prompt) for prompt in prompts]
    for _ in range(max_tokens):
        live = [row for row in rows if not row.ended and len(row.ids) < model.config.context]
        if not live:
            break
        lengths = [len(row.ids) for row in live]
        padded = [row.ids + [0] * (max(lengths) - len(row.ids)) for row in live]
        with torch.no_grad():
            logits = model(torch.tensor(padded), last_only=True, lengths=lengths)
        for row, token in zip(live, logits[:, 0].argmax(dim=-1).tolist(), strict=True):
            row.take(token)
    return [(tuple(row.ids[row.prompt_tokens :]), tuple(row.calls)) for row in rows]


class _Row:
    def __init__(self, tokenizer: Tokenizer, calculator: Calculator, prompt: Sequence[int]) -> None:
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.calls: list[ToolCall] = []
        self.ended = False
        self._tokenizer = tokenizer
        self._calculator = calculator
        self._name_of = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
        self._due: list[int] = []
        self._code: list[int] | None = None

    def take(self, token: int) -> None:
        if self._due:
            token = self._due.pop(0)
        elif self._name_of.get(token) in ("<|assistant_end|>", "<|bos|>"):
            self.ended = True
            return
        self.ids.append(token)
        name = self._name_of.get(token)
        if name == "<|python_start|>":
            self._code = []
        elif name == "<|output_start|>":
            self._code = None
        elif name == "<|python_end|>" and self._code is not None:
            self._call(self._tokenizer.decode(self._code))
            self._code = None
        elif name is None and self._code is not None:
            self._code.append(token)

    def _call(self, expression: str) -> None:
        outcome = self._calculator.evaluate(expression)
        self.calls.append(ToolCall(expression, outcome))
        self._due = [
            self._tokenizer.special("<|output_start|>"),
            *self._tokenizer.encode(outcome.text if isinstance(outcome, Result) else "error"),
            self._tokenizer.special("<|output_end|>"),
        ]
