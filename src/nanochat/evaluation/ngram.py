"""What a model has to beat: n-gram models over the same tokens, and general-purpose compressors.

The n-gram models are fit on the training tokens and judged on exactly the targets that the neural
model is judged on, so their bits per byte compare directly. The interpolated Kneser-Ney models
follow Chen & Goodman 1999 (Computer Speech & Language 13:359), section 3, with one absolute
discount D = n1/(n1 + 2·n2) for each order::

    p(w | h) = max(c(h w) - D, 0)/c(h ·) + D·N(h ·)/c(h ·) · p(w | h')

c is the count at the highest order; at a lower order it is the number of different tokens seen
before the n-gram. N(h ·) is the number of different tokens seen after h, h' is h without its oldest
token, and below the single token stands the uniform distribution, so nothing has probability nought.

A compressor sees the validation text alone, without the training text: a floor, not a rival.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer]
Keys = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Only a text too small to have an n-gram seen once leaves the discount undefined.
_FALLBACK_DISCOUNT = 0.5


@dataclass(frozen=True, slots=True)
class Targets:
    """Tokens to predict, and the two tokens before each, as arrays of one length N.

    Where nothing is known before a token (the start of a row or of a document) `<|bos|>` stands.
    """

    token: Keys
    previous: Keys
    before_previous: Keys

    def __len__(self) -> int:
        return len(self.token)


def targets_of(rows: Iterable[Tokens], bos: int, token_bytes: Tokens) -> Targets:
    """The targets of sequences whose documents begin with `bos`.

    rows: token ids; the first token of each is context only, so a row of T inputs has T + 1 tokens.
    token_bytes: bytes of each id, 0 for special tokens, which are left out as targets.
    """
    parts: list[tuple[Keys, Keys, Keys]] = []
    for row in rows:
        tokens = np.asarray(row, dtype=np.int64)
        if len(tokens) < 2:
            continue
        target, previous = tokens[1:], tokens[:-1]
        before = np.empty_like(previous)
        before[0] = bos
        before[1:] = tokens[:-2]
        before[previous == bos] = bos
        kept = token_bytes[target] > 0
        parts.append((target[kept], previous[kept], before[kept]))
    if not parts:
        empty = np.empty(0, dtype=np.int64)
        return Targets(empty, empty, empty)
    return Targets(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class Unigram:
    """Counts plus one over all ids."""

    def __init__(self, training: Targets, vocab_size: int) -> None:
        counts = np.bincount(training.token, minlength=vocab_size).astype(np.float64) + 1
        self._probability: Floats = counts / counts.sum()

    def probabilities(self, targets: Targets) -> Floats:
        """p(token), shape (N,)."""
        return self._probability[targets.token]


@dataclass(frozen=True, slots=True)
class _Level:
    """One order: its n-grams in sorted order with their counts, and its contexts with their sums."""

    ngrams: Keys
    counts: Keys
    contexts: Keys
    totals: Keys
    types: Keys
    discount: float


class KneserNey:
    """Interpolated Kneser-Ney of order 1, 2 or 3 (see the module's text).

    An n-gram (u, v, w) is kept as the integer (u·V + v)·V + w, so a table is one sorted array and a
    look-up a binary search.
    """

    def __init__(self, training: Targets, vocab_size: int, order: int) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order {order}: 1, 2 and 3 are known")
        if not len(training):
            raise ValueError("there are no training tokens to count")
        self.order = order
        self.vocab_size = vocab_size
        self._levels: list[_Level] = []
        ngrams, counts = _count(_ngrams(training, order, vocab_size))
        for level in range(order, 0, -1):
            self._levels.append(_level(ngrams, counts, vocab_size))
            # Each different n-gram is one different token before the (n-1)-gram that it ends in.
            ngrams, counts = _count(ngrams % vocab_size ** (level - 1))
        self._levels.reverse()

    def probabilities(self, targets: Targets) -> Floats:
        """p(token | the order - 1 tokens before), shape (N,)."""
        probability = np.full(len(targets), 1 / self.vocab_size)
        for order, level in enumerate(self._levels, start=1):
            ngrams = _ngrams(targets, order, self.vocab_size)
            where, known = _find(level.contexts, ngrams // self.vocab_size)
            total = np.where(known, level.totals[where], 1)
            types = np.where(known, level.types[where], 1)
            found, seen = _find(level.ngrams, ngrams)
            count = np.where(seen, level.counts[found], 0)
            above = np.maximum(count - level.discount, 0) / total
            interpolated = above + level.discount * types / total * probability
            probability = np.where(known, interpolated, probability)
        return probability


def _ngrams(targets: Targets, order: int, vocab_size: int) -> Keys:
    keys = targets.token.copy()
    if order > 1:
        keys += targets.previous * vocab_size
    if order > 2:
        keys += targets.before_previous * vocab_size**2
    return keys


def _count(keys: Keys) -> tuple[Keys, Keys]:
    """The different keys in sorted order and how often each occurs."""
    keys = np.sort(keys)
    starts = _starts(keys)
    return keys[starts], np.diff(starts, append=len(keys))


def _starts(ordered: Keys) -> Keys:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))


def _level(ngrams: Keys, counts: Keys, vocab_size: int) -> _Level:
    contexts = ngrams // vocab_size
    starts = _starts(contexts)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return _Level(
        ngrams=ngrams,
        counts=counts,
        contexts=contexts[starts],
        totals=np.add.reduceat(counts, starts),
        types=np.diff(starts, append=len(ngrams)),
        discount=once / (once + 2 * twice) if once else _FALLBACK_DISCOUNT,
    )


def _find(ordered: Keys, wanted: Keys) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """For each wanted key a valid position in `ordered`, and whether the key is really there."""
    where = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return where, ordered[where] == wanted


def bits_per_byte(probabilities: Floats, targets: Targets, token_bytes: Tokens) -> float:
    """Mean bits per byte of the targets' text. Raises ValueError where there are no targets."""
    if not len(targets):
        raise ValueError("there are no validation targets to measure on")
    return float(-np.log2(probabilities).sum() / token_bytes[targets.token].sum())


def ngram_baselines(
    training: Iterable[Tokens], validation: Iterable[Tokens], *, bos: int, token_bytes: Tokens
) -> dict[str, float]:
    """Bits per byte of the uniform, unigram, bigram and trigram model.

    training, validation: sequences as `targets_of` takes them (for training, say, one array a shard).
    """
    vocab_size = len(token_bytes)
    fitted, judged = targets_of(training, bos, token_bytes), targets_of(validation, bos, token_bytes)
    uniform = np.full(len(judged), 1 / vocab_size)
    bits = {"uniform": bits_per_byte(uniform, judged, token_bytes)}
    unigram = Unigram(fitted, vocab_size)
    bits["unigram"] = bits_per_byte(unigram.probabilities(judged), judged, token_bytes)
    for name, order in (("bigram_kn", 2), ("trigram_kn", 3)):
        model = KneserNey(fitted, vocab_size, order)
        bits[name] = bits_per_byte(model.probabilities(judged), judged, token_bytes)
    return bits


def compressor_baselines(documents: Sequence[str]) -> dict[str, float]:
    """Bits per byte of zlib, zstd and lzma, each at its strongest level, on the documents' text.

    Documents are joined by a line feed. Raises ValueError where there is no text.
    """
    import pyarrow

    text = "\n".join(documents).encode()
    if not text:
        raise ValueError("there is no validation text to compress")
    sizes = {
        "zlib_9": len(zlib.compress(text, 9)),
        "zstd_19": len(pyarrow.Codec("zstd", compression_level=19).compress(text, asbytes=True)),
        "lzma_9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
