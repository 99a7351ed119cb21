"""How the next token is chosen: what a request wishes, and one call that serves a whole batch.

In this order: repetition penalty, temperature, top-k, top-p, one draw. Rows of one batch may have
wishes of their own; what a row draws depends on its own logits, wishes and seed only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# As many alternatives as OpenAI's API gives.
MAX_LOGPROBS = 20

# Among so many of the likeliest tokens the nucleus (top-p) is looked for before all are sorted.
_NUCLEUS_CANDIDATES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """One request's wishes.

    max_tokens: at most so many new tokens, the calculator's included. temperature: 0 is greedy.
    top_k: draw among the k most likely only (None: all). top_p: draw among the most likely that
    together have at least this probability (1: all; Holtzman et al. 2019, arXiv:1904.09751).
    repetition_penalty: positive logits of tokens that were read or said are divided by it, negative
    ones multiplied (1: none; Keskar et al. 2019, arXiv:1909.05858). stop: the answer ends before the
    first of these strings. logprobs: give every token's log-probability, and those of so many of the
    likeliest (None: none are given), before penalty and temperature. seed: the same seed draws the
    same tokens for the same prompt, whatever else is in the batch (None: different every time).

    Raises ValueError naming the field.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 (got {self.max_tokens})")
        # Comparisons that NaN fails too.
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number from 0 up (got {self.temperature})")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (got {self.top_k})")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (got {self.top_p})")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be a number above 0 (got {self.repetition_penalty})")
        if not all(self.stop):
            raise ValueError("stop must not hold an empty string")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be 0 to {MAX_LOGPROBS} (got {self.logprobs})")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more (got {self.seed})")


class Sampler:
    """One row's wishes, its random numbers, and the tokens that it has met.

    stream: a number which with the seed makes the row's random numbers; two rows of one prompt differ
    by it. context: the tokens read so far (they matter to the repetition penalty only).
    """

    def __init__(self, sampling: Sampling, stream: int = 0, context: Iterable[int] = ()) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(None if sampling.seed is None else (sampling.seed, stream))
        self._met = set(context) if sampling.repetition_penalty != 1 else None

    def met(self, token: int) -> None:
        """Count a token that the row has said or was made to say."""
        if self._met is not None:
            self._met.add(token)

    def penalize(self, logits_V: Tensor) -> None:
        """Apply the repetition penalty, in place."""
        if self._met is None:
            return
        import torch

        ids = torch.tensor(sorted(self._met), device=logits_V.device)
        met, penalty = logits_V[ids], self.sampling.repetition_penalty
        logits_V[ids] = torch.where(met > 0, met / penalty, met * penalty)

    def uniform(self) -> float:
        """The next random number in [0, 1). From the host, so a seed means the same on every device."""
        return self._random.random()


def draw(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token id a row. May change the logits."""
    wishes = [sampler.sampling for sampler in samplers]
    for row, sampler in enumerate(samplers):
        if sampler.sampling.repetition_penalty != 1:
            sampler.penalize(logits_BV[row])
    if all(wish.temperature == 0 for wish in wishes):
        return [int(token) for token in logits_BV.argmax(dim=-1).tolist()]
    tokens = [0] * len(samplers)
    alike: dict[tuple[bool, int | None, bool], list[int]] = {}
    for row, wish in enumerate(wishes):
        kind = (True, None, False) if wish.temperature == 0 else (False, wish.top_k, wish.top_p < 1)
        alike.setdefault(kind, []).append(row)
    for (greedy, top_k, nucleus), rows in alike.items():
        logits = logits_BV if len(rows) == len(samplers) else logits_BV[rows]
        if greedy:
            drawn = logits.argmax(dim=-1).tolist()
        else:
            drawn = _drawn(logits, [samplers[row] for row in rows], top_k, nucleus)
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = int(token)
    return tokens


def _drawn(logits_BV: Tensor, samplers: Sequence[Sampler], top_k: int | None, nucleus: bool) -> list[int]:
    """Draws for rows that agree in `top_k` and in whether they have a `top_p`."""
    import torch  # here, so that wishes can be checked without a second of loading

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None]

    vocabulary = logits_BV.shape[-1]
    candidates = top_k or (_NUCLEUS_CANDIDATES if nucleus else vocabulary)
    ids_BN: Tensor | None = None
    if candidates < vocabulary or nucleus:
        logits_BN, ids_BN = logits_BV.topk(min(candidates, vocabulary), dim=-1)
    else:
        logits_BN = logits_BV
    # Subtracting the largest first keeps a tiny temperature from overflowing.
    largest_B1 = logits_BN.amax(dim=-1, keepdim=True)
    temperature_B1 = column([sampler.sampling.temperature for sampler in samplers])
    weights_BN = ((logits_BN - largest_B1).cpu().double() / temperature_B1).exp()
    if nucleus:
        total_B1 = weights_BN.sum(dim=-1, keepdim=True)
        if top_k is None:
            total_B1 = ((logits_BV - largest_B1).cpu().double() / temperature_B1).exp().sum(-1, keepdim=True)
        limit_B1 = column([sampler.sampling.top_p for sampler in samplers]) * total_B1
        before_BN = weights_BN.cumsum(dim=-1) - weights_BN
        wide_B = (before_BN[:, -1] + weights_BN[:, -1] < limit_B1[:, 0]).tolist()
        if any(wide_B) and candidates < vocabulary:
            # Some nuclei are wider than the candidates: these rows look at all tokens.
            return [
                _drawn(row[None], [sampler], vocabulary if wide else top_k, nucleus)[0]
                for row, sampler, wide in zip(logits_BV, samplers, wide_B, strict=True)
            ]
        # A token is kept while those before it have not reached top_p, so the first always is.
        weights_BN = weights_BN.masked_fill(before_BN >= limit_B1, 0.0)
    cumulative_BN = weights_BN.cumsum(dim=-1)
    uniform_B1 = column([sampler.uniform() for sampler in samplers])
    drawn_B1 = torch.searchsorted(cumulative_BN, uniform_B1 * cumulative_BN[:, -1:], right=True)
    drawn_B1 = drawn_B1.clamp(max=weights_BN.shape[-1] - 1)
    chosen_B1 = drawn_B1 if ids_BN is None else ids_BN.cpu().gather(1, drawn_B1)
    return [int(token) for token in chosen_B1[:, 0].tolist()]
