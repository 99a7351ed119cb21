"""A language model that says what a script says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache
from nanochat.recipes import Model


class ScriptedModel(GPT):
    """Says what a script says, position by position, and then `<|assistant_end|>`.

    answers: the tokens that follow a prompt. It keeps the ids that it has read in the KV cache, so a
    row is known by what the cache holds, wherever the engine moved it.
    """

    def __init__(
        self, vocab_size: int, context: int, answers: Mapping[tuple[int, ...], Sequence[int]], otherwise: int
    ) -> None:
        super().__init__(Model(depth=1, width=2, heads=1, kv_heads=1, context=context), vocab_size)
        self.answers = answers
        self.otherwise = otherwise
        self.rows_read: list[int] = []

    def next_token(self, read: tuple[int, ...]) -> int:
        prompt = max((p for p in self.answers if read[: len(p)] == p), key=len)
        answer, position = self.answers[prompt], len(read) - len(prompt)
        return answer[position] if position < len(answer) else self.otherwise

    def forward(
        self,
        ids_BT: Tensor,
        kv_cache: KVCache | None = None,
        last_only: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        B, T = ids_BT.shape
        self.rows_read.append(B)
        real = [T] * B if lengths is None else lengths
        if kv_cache is None:
            read = [tuple(row[:length].tolist()) for row, length in zip(ids_BT, real, strict=True)]
        else:
            positions_BT = kv_cache.begin(T).positions_BT
            stored_BS = kv_cache.k_LBGSD[0, :B, 0, :, 0]
            stored_BS[torch.arange(B)[:, None], positions_BT] = ids_BT.float()
            kv_cache.advance(T, lengths)
            read = [
                tuple(map(int, row[:length].tolist()))
                for row, length in zip(stored_BS, kv_cache.lengths, strict=True)
            ]
        logits_B1V = torch.zeros(B, 1, self.vocab_size)
        for row, ids in enumerate(read):
            if ids[0] in {prompt[0] for prompt in self.answers}:
                logits_B1V[row, 0, self.next_token(ids)] = 10.0
        assert last_only, "a script knows what comes next, and nothing else"
        return logits_B1V
