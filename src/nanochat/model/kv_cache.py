"""Keys and values of what a batch has read so far, preallocated, with a length of its own per row.

Rows of one batch may hold prompts of different lengths: a row's next token is written at that
row's length, and attention sees only what the row has. Rows come and go: a new one is put behind the
others, and where one leaves, the last takes its place. Room doubles when it runs out, and is never
more than twice what was needed.

Shape letters: L layers, B rows, G KV heads, S capacity, D head dimension, T new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.recipes import Model


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of some first tokens of a row, LGSD each."""

    k_LGSD: Tensor
    v_LGSD: Tensor

    @property
    def tokens(self) -> int:
        return self.k_LGSD.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k_LGSD.nbytes + self.v_LGSD.nbytes

    def first(self, tokens: int) -> Prefix:
        """A view of the first `tokens` tokens."""
        return Prefix(self.k_LGSD[:, :, :tokens], self.v_LGSD[:, :, :tokens])


class KVCache:
    """`batch` empty rows with room for `capacity` tokens each, in every layer.

    lengths: tokens that each row holds, kept on the host so that reading them never waits for a GPU.
    """

    def __init__(
        self,
        config: Model,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.depth, batch, config.kv_heads, capacity, config.head_dim)
        # Zeros, not whatever was in memory: masked keys are multiplied by 0, and 0 times NaN is NaN.
        self.k_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch
        self._context = config.context

    @property
    def capacity(self) -> int:
        return self.k_LBGSD.shape[3]

    @property
    def batch(self) -> int:
        """Rows in use; there may be room for more."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def begin(self, tokens: int) -> Write:
        """Where the next `tokens` tokens of every row go. Raises ValueError when they do not fit."""
        if self.longest + tokens > self.capacity:
            raise ValueError(
                f"the KV cache holds {self.capacity} tokens; {self.longest} are in use and {tokens} more do "
                "not fit"
            )
        device, end = self.k_LBGSD.device, self.longest + tokens
        first = min(self.lengths, default=0)
        new_T = torch.arange(tokens, device=device)
        if first == self.longest:
            positions_BT = (new_T + first)[None]
            mask_BTS = None if tokens == 1 or first == 0 else self.mask(positions_BT, end)
            return Write(self, positions_BT, mask_BTS, start=first, end=end)
        positions_BT = torch.tensor(self.lengths, device=device)[:, None] + new_T
        return Write(self, positions_BT, self.mask(positions_BT, end), start=None, end=end)

    def mask(self, positions_BT: Tensor, end: int) -> Tensor:
        """0 where a new token may look, among the first `end` keys, and -inf elsewhere; BTS."""
        hidden_BTS = torch.arange(end, device=positions_BT.device) > positions_BT[:, :, None]
        mask_BTS = torch.zeros(hidden_BTS.shape, device=hidden_BTS.device, dtype=self.k_LBGSD.dtype)
        return mask_BTS.masked_fill_(hidden_BTS, -math.inf)

    def advance(self, tokens: int, lengths: Sequence[int] | None = None) -> None:
        """Count the new tokens: `tokens` in every row, or `lengths` of them where rows were padded.

        What a padded row wrote beyond its own tokens is overwritten by its next ones, and until
        then no mask reaches it.
        """
        added = [tokens] * self.batch if lengths is None else lengths
        self.lengths = [length + new for length, new in zip(self.lengths, added, strict=True)]

    # ----------------------------------------------------------------------------------------------
    # Rows

    def prefix(self, row: int, tokens: int | None = None) -> Prefix:
        """A view of a row's first `tokens` tokens (None: all it has). Later rows may overwrite it."""
        end = self.lengths[row] if tokens is None else tokens
        return Prefix(self.k_LBGSD[:, row, :, :end], self.v_LBGSD[:, row, :, :end])

    def load(self, row: int, prefix: Prefix) -> None:
        """Make a row hold a copy of `prefix`."""
        self.k_LBGSD[:, row, :, : prefix.tokens] = prefix.k_LGSD
        self.v_LBGSD[:, row, :, : prefix.tokens] = prefix.v_LGSD
        self.lengths[row] = prefix.tokens

    def append(self, prefix: Prefix) -> None:
        """A new row behind the others, which holds a copy of `prefix`."""
        self.reserve(self.batch + 1, prefix.tokens)
        self.lengths.append(0)
        self.load(self.batch - 1, prefix)

    def remove(self, row: int) -> None:
        """Give up a row; the last one takes its place."""
        last = self.batch - 1
        if row != last:
            self.load(row, self.prefix(last))
        self.lengths.pop()

    def reserve(self, batch: int, capacity: int) -> None:
        """Make sure that there is room for so many rows of so many tokens; what is stored stays."""
        L, rows, G, room, D = self.k_LBGSD.shape
        if batch <= rows and capacity <= room:
            return
        rows = rows if batch <= rows else max(batch, 2 * rows)
        room = room if capacity <= room else max(capacity, min(2 * room, self._context))
        end = self.longest
        for name in ("k_LBGSD", "v_LBGSD"):
            old = getattr(self, name)
            new = old.new_zeros((L, rows, G, room, D))
            new[:, : self.batch, :, :end] = old[:, : self.batch, :, :end]
            setattr(self, name, new)


class Write:
    """One forward pass over new tokens: where they go, and what each of them may look at.

    positions_BT: of the new tokens in their rows (1T where all rows are equally long). mask_BTS: see
    `attend`. start: where all rows write, or None where each has a place of its own. end: keys that are
    looked at, the new ones included.
    """

    def __init__(
        self, cache: KVCache, positions_BT: Tensor, mask_BTS: Tensor | None, *, start: int | None, end: int
    ) -> None:
        self.positions_BT = positions_BT
        self.mask_BTS = mask_BTS
        self._cache, self._start, self._end = cache, start, end
        if start is None:
            self._rows_B1 = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]

    def __call__(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns those up to the longest row, BGSD."""
        batch, end = k_BGTD.shape[0], self._end
        k_BGSD, v_BGSD = self._cache.k_LBGSD[layer, :batch], self._cache.v_LBGSD[layer, :batch]
        if self._start is not None:
            k_BGSD[:, :, self._start : end] = k_BGTD
            v_BGSD[:, :, self._start : end] = v_BGTD
        else:
            # Advanced indices around a slice put the indexed dimensions first: B T G D.
            k_BGSD[self._rows_B1, :, self.positions_BT] = k_BGTD.transpose(1, 2).to(k_BGSD.dtype)
            v_BGSD[self._rows_B1, :, self.positions_BT] = v_BGTD.transpose(1, 2).to(v_BGSD.dtype)
        return k_BGSD[:, :, :end], v_BGSD[:, :, :end]
