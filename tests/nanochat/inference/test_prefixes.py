from __future__ import annotations

import torch

from nanochat.inference.prefixes import PrefixCache
from nanochat.model.kv_cache import Prefix


def prefix(tokens: list[int]) -> Prefix:
    """Two numbers for a token, so that it can be told whose they are: 8 bytes."""
    values = torch.tensor([float(token) for token in tokens]).view(1, 1, -1, 1)
    return Prefix(values, values + 0.5)


def keys(found: Prefix | None) -> list[int] | None:
    return None if found is None else [int(value) for value in found.k_LGSD.flatten()]


def test_the_longest_known_beginning_is_found() -> None:
    cache = PrefixCache(10_000)
    a, b = list(range(20)), [*range(10), *range(50, 70)]
    cache.add(a, prefix(a))
    cache.add(b, prefix(b))
    assert keys(cache.find([*a, 1, 2])) == a
    assert keys(cache.find([*b[:15], 99])) == b[:15]
    assert keys(cache.find([7] * 30)) is None


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    cache = PrefixCache(10_000)
    ids = list(range(20))
    cache.add(ids, prefix(ids))
    assert keys(cache.find(ids)) == ids[:-1]
    assert keys(cache.find(ids[:12])) == ids[:11]


def test_a_few_shared_tokens_are_not_worth_a_copy() -> None:
    cache = PrefixCache(10_000)
    cache.add(list(range(20)), prefix(list(range(20))))
    assert cache.find([0, 1, 2, 3, 99, 98, 97, 96, 95, 94]) is None
    cache.add([1, 2, 3], prefix([1, 2, 3]))
    assert len(cache) == 1


def test_memory_is_bounded_and_what_is_used_stays() -> None:
    rows = [[number] * 20 for number in range(4)]
    cache = PrefixCache(max_bytes=3 * 160)
    for row in rows[:3]:
        cache.add(row, prefix(row))
    assert (len(cache), cache.nbytes) == (3, 480)
    assert cache.find([*rows[0], 9]) is not None
    cache.add(rows[3], prefix(rows[3]))
    assert (len(cache), cache.nbytes) == (3, 480)
    assert [cache.find([*row, 9]) is not None for row in rows] == [True, False, True, True]
    cache.add([5] * 100, prefix([5] * 100))
    assert len(cache) == 3


def test_a_longer_one_replaces_its_beginning() -> None:
    cache = PrefixCache(10_000)
    ids = list(range(40))
    cache.add(ids[:20], prefix(ids[:20]))
    cache.add(ids, prefix(ids))
    cache.add(ids[:30], prefix(ids[:30]))
    assert (len(cache), cache.nbytes) == (1, 320)


def test_what_is_kept_is_a_copy() -> None:
    cache = PrefixCache(10_000)
    ids = list(range(20))
    given = prefix(ids)
    cache.add(ids, given)
    given.k_LGSD.zero_()
    assert keys(cache.find([*ids, 1])) == ids
