"""How the next token is chosen: greedily, or drawn at a temperature from the k most likely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """One request's wishes.

    max_tokens: at most so many new tokens, the calculator's included. temperature: 0 is greedy.
    top_k: draw among the k most likely only (None: all). seed: the same seed draws the same tokens
    for the same prompt, whatever else is in the batch (None: different every time).

    Raises ValueError naming the field.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 (got {self.max_tokens})")
        # A comparison that NaN fails too.
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number from 0 up (got {self.temperature})")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (got {self.top_k})")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more (got {self.seed})")


class Sampler:
    """Draws one token for each row of logits; each row has a random stream of its own.

    streams: a number for each row, which with the seed makes its stream; two rows of the same prompt
    differ by it.
    """

    def __init__(self, sampling: Sampling, streams: list[int]) -> None:
        self.sampling = sampling
        self._random = [
            np.random.default_rng(None if sampling.seed is None else (sampling.seed, stream))
            for stream in streams
        ]

    def draw(self, logits_BV: Tensor) -> list[int]:
        """One token id a row."""
        import torch  # here, so that wishes can be checked without a second of loading

        if self.sampling.temperature == 0:
            return [int(token) for token in logits_BV.argmax(dim=-1).tolist()]
        top_k = logits_BV.shape[-1] if self.sampling.top_k is None else self.sampling.top_k
        values, ids = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1)
        # Subtracting the largest first keeps a tiny temperature from overflowing.
        weights = torch.softmax((values - values[:, :1]) / self.sampling.temperature, dim=-1)
        # Inversion: the numbers come from the host, so a seed means the same on every device.
        weights = weights.cpu().double()
        uniform = torch.tensor([random.random() for random in self._random], dtype=torch.float64)
        cumulative = weights.cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
        drawn = drawn.clamp(max=weights.shape[-1] - 1).to(ids.device)
        return [int(token) for token in ids.gather(1, drawn)[:, 0].tolist()]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, in this order."""
        self._random = [self._random[row] for row in rows]
