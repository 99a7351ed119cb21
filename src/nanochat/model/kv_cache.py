"""Keys and values of what a batch has read so far, preallocated, with a length of its own per row.

Rows of one batch may hold prompts of different lengths: a row's next token is written at that
row's length, and attention sees only what the row has. Nothing is ever moved or grown.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.recipes import Model


class KVCache:
    """Room for `capacity` tokens of `batch` rows in every layer.

    Shape letters: L layers, B rows, G KV heads, S capacity, D head dimension, T new tokens.
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
        self.k_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths_B = torch.zeros(batch, device=device, dtype=torch.long)
        self.longest = 0  # of lengths_B, kept on the host so that reading it never waits for a GPU

    @property
    def capacity(self) -> int:
        return self.k_LBGSD.shape[3]

    @property
    def batch(self) -> int:
        return self.lengths_B.shape[0]

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens of every row, BT. Raises ValueError when they do not fit."""
        if self.longest + tokens > self.capacity:
            raise ValueError(
                f"the KV cache holds {self.capacity} tokens; {self.longest} are in use and {tokens} more do "
                "not fit"
            )
        return self.lengths_B[:, None] + torch.arange(tokens, device=self.lengths_B.device)

    def write(
        self, layer: int, positions_BT: Tensor, k_BGTD: Tensor, v_BGTD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; returns those of the layer up to the longest row, BGSD."""
        rows_B1 = torch.arange(self.batch, device=positions_BT.device)[:, None]
        # Advanced indices around a slice put the indexed dimensions first: B T G D.
        self.k_LBGSD[layer][rows_B1, :, positions_BT] = k_BGTD.transpose(1, 2).to(self.k_LBGSD.dtype)
        self.v_LBGSD[layer][rows_B1, :, positions_BT] = v_BGTD.transpose(1, 2).to(self.v_LBGSD.dtype)
        end = self.longest + positions_BT.shape[1]
        return self.k_LBGSD[layer, :, :, :end], self.v_LBGSD[layer, :, :, :end]

    def mask(self, positions_BT: Tensor) -> Tensor:
        """Which of the stored positions each new token may look at, BTS: those up to its own."""
        end = self.longest + positions_BT.shape[1]
        return torch.arange(end, device=positions_BT.device) <= positions_BT[:, :, None]

    def advance(self, tokens: int, lengths_B: Tensor | None = None) -> None:
        """Count the new tokens: `tokens` in every row, or `lengths_B` of them where rows were padded.

        What a padded row wrote beyond its own tokens is overwritten by its next ones, and until
        then no mask reaches it.
        """
        self.lengths_B += tokens if lengths_B is None else lengths_B
        self.longest = self.longest + tokens if lengths_B is None else int(self.lengths_B.max())

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (in this order): finished generations leave, one prompt becomes many."""
        self.k_LBGSD = self.k_LBGSD[:, rows]
        self.v_LBGSD = self.v_LBGSD[:, rows]
        self.lengths_B = self.lengths_B[rows]
        self.longest = int(self.lengths_B.max()) if len(rows) else 0
