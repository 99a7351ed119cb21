"""The reference rule, word for word and slowly: what rustbpe must learn, merge by merge.

Independent of the crate: another language, another regular-expression engine, no incremental counts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import regex


def learn(texts: Iterable[str], merges: int, pattern: str) -> list[bytes]:
    """The bytes of each token in id order: 256 bytes, then at most `merges` merges.

    The pair with the highest count comes first, ties go to the smaller pair of ids. A pair's count is
    its adjacent positions, overlapping ones included; joining is greedy from the left.
    """
    splitter = regex.compile(pattern)
    counts = Counter(word for text in texts for word in splitter.findall(text))
    words = [(list(word.encode()), count) for word, count in counts.items()]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(merges):
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        words = [(joined(ids, best, len(tokens) - 1), count) for ids, count in words]
    return tokens


def joined(ids: list[int], pair: tuple[int, int], token: int) -> list[int]:
    result: list[int] = []
    at = 0
    while at < len(ids):
        if tuple(ids[at : at + 2]) == pair:
            result.append(token)
            at += 2
        else:
            result.append(ids[at])
            at += 1
    return result
