"""Keys and values of what was read before, found again by their tokens.

The next turn of a chat begins with all earlier ones, answer included: with a row's keys and values
kept when it ends, only the new question has to be read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from nanochat.model.kv_cache import Prefix

# Fewer shared tokens than these are read anew: every chat begins with the same two.
MIN_SHARED_TOKENS = 8

# As much as is kept unless told: about 3,600 tokens of d12 in fp32.
PREFIX_CACHE_BYTES = 256 * 2**20


class PrefixCache:
    """At most `max_bytes` of keys and values; what was not used for longest goes first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, prompt: Sequence[int]) -> Prefix | None:
        """The longest known beginning of `prompt`; its last token is never part of it.

        A view: it is to be copied before anything else is added.
        """
        prompt = tuple(prompt)
        shared, best = max(((_shared(tokens, prompt), tokens) for tokens in self._kept), default=(0, ()))
        shared = min(shared, len(prompt) - 1)
        if shared < MIN_SHARED_TOKENS:
            return None
        self._kept.move_to_end(best)
        return self._kept[best].first(shared)

    def add(self, tokens: Sequence[int], prefix: Prefix) -> None:
        """Keep a copy of `prefix`, which belongs to `tokens`; it replaces its own beginnings."""
        tokens = tuple(tokens)
        assert len(tokens) == prefix.tokens, "a prefix is as long as its tokens"
        if prefix.nbytes > self.max_bytes or len(tokens) < MIN_SHARED_TOKENS:
            return
        covered = next((kept for kept in self._kept if kept[: len(tokens)] == tokens), None)
        if covered is not None:
            self._kept.move_to_end(covered)
            return
        for beginning in [kept for kept in self._kept if tokens[: len(kept)] == kept]:
            self._drop(beginning)
        while self._kept and self.nbytes + prefix.nbytes > self.max_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[tokens] = Prefix(prefix.k_LGSD.clone(), prefix.v_LGSD.clone())
        self.nbytes += prefix.nbytes

    def _drop(self, tokens: tuple[int, ...]) -> None:
        self.nbytes -= self._kept.pop(tokens).nbytes


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many first elements are equal."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(index for index in range(length) if a[index] != b[index])
