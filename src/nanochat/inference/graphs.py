"""Decoding steps of fixed shapes, which a GPU can replay without launching their kernels one by one.

A step of a small model is a few hundred kernels of some microseconds each, so launching them takes
longer than running them (Horace He et al. 2023, "Accelerating Generative AI with PyTorch II"). A CUDA
graph is recorded once for each shape; for few shapes, rows are filled up to a power of two, and keys to
a multiple of `KEYS`.

Recording and replaying has not been run: there was no GPU where this was written. So it is off unless
the environment asks for it. The step that is recorded is tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanochat.model.gpt import GPT
from nanochat.model.kv_cache import KVCache, Write

GRAPHS_ENV = "NANOCHAT_CUDA_GRAPHS"
KEYS = 256


class FixedStep(KVCache):
    """Reads one token of each of `rows` rows of a cache that look at its first `end` keys.

    A view of the cache: what it writes is in the cache, but it counts no tokens. `ids_B1` and
    `positions_B1` are what the next `run` reads. A row that is not in use reads id 0 at position 0.
    """

    def __init__(self, model: GPT, cache: KVCache, rows: int, end: int) -> None:
        super().__init__(model.config, rows, 0)
        self.k_LBGSD, self.v_LBGSD = cache.k_LBGSD, cache.v_LBGSD
        self.ids_B1 = torch.zeros((rows, 1), dtype=torch.long, device=model.device)
        self.positions_B1 = torch.zeros_like(self.ids_B1)
        self._model, self._end = model, end

    def begin(self, tokens: int) -> Write:
        mask_B1S = self.mask(self.positions_B1, self._end)
        return Write(self, self.positions_B1, mask_B1S, start=None, end=self._end)

    def advance(self, tokens: int, lengths: Sequence[int] | None = None) -> None:
        """Nothing is counted: the positions are given."""

    def set(self, ids: list[int], positions: list[int]) -> None:
        """What the rows read next, and where."""
        unused = [0] * (self.batch - len(ids))
        self.ids_B1.copy_(torch.tensor([ids + unused]).t())
        self.positions_B1.copy_(torch.tensor([positions + unused]).t())

    def run(self) -> Tensor:
        """Logits B1V."""
        return self._model(self.ids_B1, kv_cache=self, last_only=True)


class GraphedSteps:
    """Decoding steps of one model as CUDA graphs, recorded when they are first needed."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._recorded: dict[tuple[int, int], tuple[FixedStep, Callable[[], Tensor]]] = {}
        self._memory: int | None = None

    def __call__(self, ids: list[int], cache: KVCache, lengths: list[int]) -> Tensor:
        """Logits B1V after one token of each row of `cache`, of which `lengths` (0 or 1) are counted."""
        rows = 1 << (len(ids) - 1).bit_length()
        end = min(-(-(cache.longest + 1) // KEYS) * KEYS, self._model.config.context)
        cache.reserve(rows, end)
        if cache.k_LBGSD.data_ptr() != self._memory:
            # The graphs write where the cache was.
            self._recorded, self._memory = {}, cache.k_LBGSD.data_ptr()
        known = self._recorded.get((rows, end))
        step = known[0] if known is not None else FixedStep(self._model, cache, rows, end)
        step.set(ids, cache.lengths)
        if known is None:
            # Recording reads the same tokens as the replay, and writes the same keys.
            known = self._recorded[rows, end] = step, _record(step.run)
        logits_B1V = known[1]()[: len(ids)].clone()
        cache.advance(1, lengths)
        return logits_B1V


def _record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` as a CUDA graph: calling it replays the graph; its result is overwritten by the next call."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # libraries set themselves up outside of the graph
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
