"""The running batch: requests of different prompts and lengths join and leave it at any step.

A step reads one piece of the prompts that wait, so that a long one does not hold up the others'
answers for longer, and then one token of every row that is being answered. Prompts of like length
are read together, padded on the right, with the head applied to each row's last token only; the n
answers to one prompt share its reading. A row's tokens depend on its own prompt, wishes and seed,
not on its company, up to the rounding of matrix products of another size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.inference.calculator import Calculator
from nanochat.inference.generation import Request, Row, Token
from nanochat.inference.graphs import GRAPHS_ENV, GraphedSteps
from nanochat.inference.prefixes import PrefixCache
from nanochat.inference.sampling import draw
from nanochat.inference.tools import ToolMachine
from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache, Prefix
from nanochat.tokenizer import Tokenizer

# Prompt tokens, padding included, that one step reads.
READ_TOKENS = 512

# Padding that is worth a pass less: so many tokens, or this part of those that count.
_PADDING_TOKENS = 64
_PADDING_SHARE = 0.25

# Room that a new row gets for its answer before the cache grows.
_ANSWER_ROOM = 64

# How long a step waits for the calculator where there is nothing else to do.
_CALCULATOR_WAIT_S = 0.02


class Prompt:
    """A request in the batch. reused: tokens whose keys and values were known already."""

    def __init__(self, ids: list[int], rows: list[Row]) -> None:
        self.ids = ids
        self.rows = rows
        self.reused = 0

    @property
    def ended(self) -> bool:
        return all(row.ended for row in self.rows)


@dataclass(slots=True)
class _Reading:
    """Prompts that are being read together; `rest` is what is left of each."""

    prompts: list[Prompt]
    rest: list[list[int]]
    cache: KVCache


class Batch:
    """Answers requests with one model, in steps. Not for several threads at once.

    max_rows: answers that are worked on together; more wait for their turn, in order. prefixes: where
    keys and values of rows that ended are kept. executor: where the calculator works (None: in the
    step that asks it).
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        calculator: Calculator,
        *,
        max_rows: int = 64,
        prefixes: PrefixCache | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.waiting: deque[Prompt] = deque()
        self.rows: list[Row] = []
        self._calculator = calculator
        self._executor = executor
        self._prefixes = prefixes
        self._reading: _Reading | None = None
        self._cache: KVCache | None = None
        graphed = model.device.type == "cuda" and os.environ.get(GRAPHS_ENV) == "1"
        self._graphs = GraphedSteps(model) if graphed else None
        self._stop_ids = frozenset({tokenizer.special("<|assistant_end|>"), tokenizer.bos})

    @property
    def idle(self) -> bool:
        return not (self.waiting or self._reading or self.rows)

    def check(self, request: Request) -> None:
        """Raises ValueError where a request can never be answered: what is wrong with it."""
        prompt, context = request.prompt, self.model.config.context
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least <|bos|>")
        if len(prompt) >= context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in this "
                f"model's context of {context}; shorten it"
            )
        unknown = next((token for token in prompt if not 0 <= token < self.tokenizer.vocab_size), None)
        if unknown is not None:
            raise ValueError(
                f"the prompt's token id {unknown} is not in the vocabulary of {self.tokenizer.vocab_size}"
            )
        if not 1 <= request.n <= self.max_rows:
            raise ValueError(f"n must be 1 to {self.max_rows} (got {request.n})")

    def add(self, request: Request) -> Prompt:
        """Put a request behind those that wait. Raises ValueError as `check` does."""
        self.check(request)
        ids = list(request.prompt)
        limit = min(self.model.config.context, len(ids) + request.sampling.max_tokens)
        rows = [
            Row(
                ids,
                request.sampling,
                stream=request.stream + number,
                limit=limit,
                machine=ToolMachine(self.tokenizer, self._calculator, self._executor),
            )
            for number in range(request.n)
        ]
        prompt = Prompt(ids, rows)
        self.waiting.append(prompt)
        return prompt

    def cancel(self, prompt: Prompt) -> None:
        """End what has not ended of a request; its rows leave with the next step."""
        for row in prompt.rows:
            if not row.ended:
                row.end("cancelled")
        if prompt in self.waiting:
            self.waiting.remove(prompt)

    @torch.inference_mode()
    def step(self) -> None:
        """Read a piece of the prompts that wait, and let every row grow by a token."""
        self._leave()
        self._read()
        self._grow()
        self._leave()

    # ----------------------------------------------------------------------------------------------
    # Prompts

    def _read(self) -> None:
        reading = self._reading or self._next_reading()
        if reading is None:
            return
        pieces = [rest[:READ_TOKENS] for rest in reading.rest]
        reading.rest = [rest[READ_TOKENS:] for rest in reading.rest]
        lengths = [len(piece) for piece in pieces]
        # Any id does for padding: nothing that counts looks at it.
        padded = [piece + [0] * (max(lengths) - len(piece)) for piece in pieces]
        logits_BV = self._forward(padded, reading.cache, lengths)
        if all(prompt.ended for prompt in reading.prompts):
            self._reading = None
        elif any(reading.rest):
            self._reading = reading
        else:
            self._reading = None
            self._begin(reading, logits_BV)

    def _next_reading(self) -> _Reading | None:
        """The prompt that waits for longest, and others that can be read in the same pass."""
        chosen: list[Prompt] = []
        known: list[Prefix | None] = []
        passed: list[Prompt] = []
        free = self.max_rows - len(self.rows)
        for _ in range(min(len(self.waiting), self.max_rows)):
            prompt = self.waiting.popleft()
            if prompt.ended:
                continue
            prefix = self._prefixes.find(prompt.ids) if self._prefixes is not None else None
            if len(prompt.rows) > free:
                passed.append(prompt)
                break
            if self._read_together([*chosen, prompt], [*known, prefix]):
                free -= len(prompt.rows)
                chosen.append(prompt)
                known.append(prefix)
            else:
                passed.append(prompt)
        self.waiting.extendleft(reversed(passed))
        if not chosen:
            return None
        cache = self._new_cache(len(chosen), max(len(prompt.ids) for prompt in chosen))
        for row, (prompt, prefix) in enumerate(zip(chosen, known, strict=True)):
            if prefix is not None:
                cache.load(row, prefix)
                prompt.reused = prefix.tokens
        rest = [prompt.ids[prompt.reused :] for prompt in chosen]
        # Padding is written too, behind the longest of what is known.
        cache.reserve(len(chosen), cache.longest + max(map(len, rest)))
        return _Reading(chosen, rest, cache)

    def _read_together(self, prompts: list[Prompt], known: list[Prefix | None]) -> bool:
        """Whether prompts are worth one padded pass. One alone always is."""
        reused = [prefix.tokens if prefix is not None else 0 for prefix in known]
        lengths = [len(prompt.ids) - tokens for prompt, tokens in zip(prompts, reused, strict=True)]
        area, real = max(lengths) * len(lengths), sum(lengths)
        return len(prompts) == 1 or (
            area <= READ_TOKENS
            and area - real <= max(_PADDING_TOKENS, _PADDING_SHARE * real)
            and max(reused) + max(lengths) <= self.model.config.context
        )

    def _begin(self, reading: _Reading, logits_BV: Tensor) -> None:
        """Choose every row's first token, and let the rows join."""
        joining = [
            (index, row)
            for index, prompt in enumerate(reading.prompts)
            for row in prompt.rows
            if not row.ended
        ]
        self._choose([row for _, row in joining], logits_BV[[index for index, _ in joining]])
        if self._cache is None:
            self._cache = self._new_cache(0, 0)
        longest = max(len(row.prompt) for _, row in joining)
        room = min(max(row.limit for _, row in joining), longest + _ANSWER_ROOM)
        self._cache.reserve(len(self.rows) + len(joining), room)
        for index, row in joining:
            self._cache.append(reading.cache.prefix(index))
            self.rows.append(row)
        self._leave()

    # ----------------------------------------------------------------------------------------------
    # Answers

    def _grow(self) -> None:
        """Read the newest token of every row, and choose the next."""
        unread = [int(row.unread) for row in self.rows]
        if any(unread):
            assert self._cache is not None, "rows have a cache"
            self._cache.reserve(len(self.rows), self._cache.longest + 1)
            # A row that waits for the calculator reads padding meanwhile.
            newest = [row.tokens[-1].id for row in self.rows]
            if self._graphs is not None:
                logits_BV = self._graphs(newest, self._cache, unread)[:, 0, : self.tokenizer.vocab_size]
            else:
                logits_BV = self._forward([[token] for token in newest], self._cache, unread)
            for row in self.rows:
                row.unread = False
            self._choose(self.rows, logits_BV, {index for index, new in enumerate(unread) if not new})
        elif self.rows:
            calls = [row.waiting for row in self.rows]
            if all(calls) and not (self.waiting or self._reading):
                wait([call for call in calls if call], _CALCULATOR_WAIT_S, FIRST_COMPLETED)
            self._choose(self.rows, None)

    def _choose(self, rows: Sequence[Row], logits_BV: Tensor | None, waited: Set[int] = frozenset()) -> None:
        """Let every row take its next token: the one that is forced upon it, or the model's choice.

        waited: rows whose logits mean nothing, since they were waiting for the calculator; what they take
        is forced. logits_BV: None where all rows were.
        """
        forced = {}
        choosing = []
        for index, row in enumerate(rows):
            if row.ended or row.waiting is not None:
                continue
            due = row.take_due()
            if due is None:
                choosing.append(index)
            else:
                forced[index] = due
        known = {} if logits_BV is None else self._logprobs(rows, logits_BV, waited)
        chosen = dict(forced)
        if choosing:
            assert logits_BV is not None, "what follows a call is forced"
            chosen_BV = logits_BV if len(choosing) == len(rows) else logits_BV[choosing]
            ids = draw(chosen_BV, [rows[index].sampler for index in choosing])
            chosen |= dict(zip(choosing, ids, strict=True))
        for index, token in chosen.items():
            said = Token(token, index in forced)
            if index in known:
                logprobs_V, top = known[index]
                said = Token(token, index in forced, float(logprobs_V[token]), top)
            rows[index].accept(said, self._stop_ids)

    @staticmethod
    def _logprobs(
        rows: Sequence[Row], logits_BV: Tensor, waited: Set[int]
    ) -> dict[int, tuple[Tensor, tuple[tuple[int, float], ...]]]:
        """By row that asked for them: all log-probabilities, V, and the likeliest tokens with theirs."""
        known = {}
        for index, row in enumerate(rows):
            wanted = row.sampling.logprobs
            if wanted is not None and index not in waited:
                logprobs_V = torch.log_softmax(logits_BV[index].float(), dim=-1).cpu()
                values, ids = logprobs_V.topk(min(wanted, len(logprobs_V)))
                known[index] = logprobs_V, tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return known

    def _leave(self) -> None:
        """Give up the places of rows that ended."""
        for index in reversed(range(len(self.rows))):
            row = self.rows[index]
            if not row.ended:
                continue
            assert self._cache is not None, "rows have a cache"
            if self._prefixes is not None:
                read = self._cache.lengths[index]
                ids = [*row.prompt, *(token.id for token in row.tokens)]
                self._prefixes.add(ids[:read], self._cache.prefix(index))
            self._cache.remove(index)
            self.rows[index] = self.rows[-1]
            self.rows.pop()
        if not self.rows:
            self._cache = None  # an idle engine holds no memory for rows

    # ----------------------------------------------------------------------------------------------
    # The model

    def _forward(self, ids: list[list[int]], cache: KVCache, lengths: list[int]) -> Tensor:
        """Read `lengths` ids of each row; logits BV after each row's last one.

        Without the ids that only pad the model's vocabulary: they mean nothing and are never drawn.
        """
        ids_BT = torch.tensor(ids, device=self.model.device)
        padded = min(lengths) < ids_BT.shape[1]
        logits_B1V = self.model(ids_BT, kv_cache=cache, last_only=True, lengths=lengths if padded else None)
        return logits_B1V[:, 0, : self.tokenizer.vocab_size]

    def _new_cache(self, rows: int, capacity: int) -> KVCache:
        return KVCache(self.model.config, rows, capacity, self.model.device, self.model.dtype)
