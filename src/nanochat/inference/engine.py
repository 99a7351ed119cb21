"""The engine: batched generation with a KV cache, and the calculator in the loop.

Prompts of different lengths share a batch: they are read in one pass, padded on the right, with the
head applied to each row's last token only; from then on every row takes one token a step, written
at its own place of a cache that is allocated once. Rows that end leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanochat.data.conversations import Part
from nanochat.inference.calculator import Calculator
from nanochat.inference.sampling import Sampler, Sampling
from nanochat.inference.tools import ToolCall, ToolMachine, join_pieces
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer

# The part of a batch that may be finished before it is cut down: cutting copies the cache.
_FINISHED_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one row said.

    ids: the new tokens, without the one that ended it. forced: which of them were the calculator's
    output and not the model's choice. parts: the same as text, calls and outputs. stop_id: the
    token that ended it, or None where `max_tokens` or the context did.
    """

    ids: tuple[int, ...]
    forced: tuple[bool, ...]
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...]
    stop_id: int | None

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        return "length" if self.stop_id is None else "stop"

    @property
    def text(self) -> str:
        """What the model says to the user: neither the calculator's calls nor its outputs."""
        return "".join(part.text for part in self.parts if part.type == "text")


class Engine:
    """Generates with one model. Not for several threads at once.

    max_batch: prompts that are worked on together; more are done one batch after the other.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        calculator: Calculator | None = None,
        *,
        max_batch: int = 64,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.calculator = calculator or Calculator()
        self.max_batch = max_batch
        self._stops = frozenset({tokenizer.special("<|assistant_end|>"), tokenizer.bos})

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.config.context

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """One generation for each prompt, in their order. A prompt is ids, `<|bos|>` included.

        Ends at `<|assistant_end|>` or `<|bos|>`. Raises ValueError for a prompt that is empty or
        fills the context.
        """
        rows = [self._row(prompt, stream, sampling) for stream, prompt in enumerate(prompts)]
        # Rows of like length waste the least padding.
        ordered = sorted(rows, key=lambda row: len(row.prompt))
        for start in range(0, len(ordered), self.max_batch):
            for _ in self._run(ordered[start : start + self.max_batch], sampling):
                pass
        return [row.generation() for row in rows]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """The text of one generation as it comes, in whole characters. Raises as `generate` does."""
        return (part.text for part in self.stream_parts(prompt, sampling) if part.type == "text")

    def stream_parts(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Part]:
        """One generation as it comes: text, code and outputs, each in whole characters.

        Consecutive pieces of one type belong together. Raises as `generate` does, at the call.
        """
        row = self._row(prompt, 0, sampling)
        return (piece for _ in self._run([row], sampling) for piece in row.take_pieces())

    def _row(self, prompt: Sequence[int], stream: int, sampling: Sampling) -> _Row:
        if not prompt:
            raise ValueError(f"prompt {stream + 1} is empty; it needs at least <|bos|>")
        if len(prompt) >= self.context:
            raise ValueError(
                f"prompt {stream + 1} has {len(prompt)} tokens, which leaves no room for an answer in this "
                f"model's context of {self.context}; shorten it"
            )
        return _Row(
            prompt=list(prompt),
            stream=stream,
            limit=min(self.context, len(prompt) + sampling.max_tokens),
            machine=ToolMachine(self.tokenizer, self.calculator),
        )

    def _run(self, rows: list[_Row], sampling: Sampling) -> Iterator[None]:
        """Bring all rows to their end; yields after each step, in which every live row took a token."""
        batch = list(rows)
        sampler = Sampler(sampling, [row.stream for row in batch])
        logits_BV, cache = self._prefill(batch)
        while True:
            for row, token in zip(batch, sampler.draw(logits_BV), strict=True):
                if not row.ended:
                    row.accept(token, self._stops)
            yield
            live = [index for index, row in enumerate(batch) if not row.ended]
            if not live:
                return
            finished = len(batch) - len(live)
            # A finished row goes on counting tokens, so it may be the one that fills the cache.
            if finished > _FINISHED_SHARE * len(batch) or (finished and cache.longest == cache.capacity):
                batch = [batch[index] for index in live]
                sampler.keep(live)
                cache.select(torch.tensor(live, device=self.model.device))
            logits_BV = self._step(batch, cache)

    @torch.inference_mode()
    def _prefill(self, batch: list[_Row]) -> tuple[Tensor, KVCache]:
        """Read the prompts; logits BV after the last token of each."""
        device = self.model.device
        longest = max(len(row.prompt) for row in batch)
        # Any id does for padding: nothing that counts looks at it.
        padded = [[*row.prompt, *[0] * (longest - len(row.prompt))] for row in batch]
        capacity = max(row.limit for row in batch)
        cache = KVCache(self.model.config, len(batch), capacity, device, self.model.dtype)
        lengths_B = torch.tensor([len(row.prompt) for row in batch], device=device)
        ids_BT = torch.tensor(padded, device=device)
        return self._real(self.model(ids_BT, kv_cache=cache, last_only=True, lengths_B=lengths_B)), cache

    @torch.inference_mode()
    def _step(self, batch: list[_Row], cache: KVCache) -> Tensor:
        """Read the newest token of every row; logits BV after it. Finished rows read padding."""
        newest = [0 if row.ended else row.ids[-1] for row in batch]
        ids_B1 = torch.tensor(newest, device=self.model.device)[:, None]
        return self._real(self.model(ids_B1, kv_cache=cache, last_only=True))

    def _real(self, logits_B1V: Tensor) -> Tensor:
        """Without the ids that only pad the model's vocabulary: they mean nothing and are never drawn."""
        return logits_B1V[:, 0, : self.tokenizer.vocab_size]


class _Row:
    """One prompt and what has come after it.

    stream: which random numbers are the row's. limit: tokens of prompt and answer at most.
    """

    def __init__(self, *, prompt: list[int], stream: int, limit: int, machine: ToolMachine) -> None:
        self.prompt = prompt
        self.stream = stream
        self.limit = limit
        self.ids: list[int] = []
        self.ended = False
        self._machine = machine
        self._forced: list[bool] = []
        self._pieces: list[Part] = []
        self._taken = 0
        self._stop_id: int | None = None

    def accept(self, sampled: int, stops: frozenset[int]) -> None:
        """Grow by one token: the one that is due where there is one, else `sampled`."""
        due = self._machine.take_due()
        if due is None and sampled in stops:
            self._end(sampled)
            return
        token = sampled if due is None else due
        self.ids.append(token)
        self._forced.append(due is not None)
        self._pieces.extend(self._machine.read(token))
        if len(self.prompt) + len(self.ids) >= self.limit:
            self._end(None)

    def take_pieces(self) -> list[Part]:
        """The pieces that came since the last call."""
        pieces, self._taken = self._pieces[self._taken :], len(self._pieces)
        return pieces

    def generation(self) -> Generation:
        assert self.ended, "the row is still growing"
        return Generation(
            ids=tuple(self.ids),
            forced=tuple(self._forced),
            parts=join_pieces(self._pieces),
            tool_calls=tuple(self._machine.calls),
            stop_id=self._stop_id,
        )

    def _end(self, stop_id: int | None) -> None:
        self._pieces.extend(self._machine.finish())
        self._stop_id = stop_id
        self.ended = True
