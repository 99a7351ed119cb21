"""Which words, sums and modules are held out: decided by a hash, so that no list has to be kept.

A tenth of everything never occurs in training: five in a hundred for validation while training
runs, five in a hundred for the questions asked at the end.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_of(kind: str, key: str) -> Split:
    """The split that `key` belongs to, always the same one. `kind` keeps families independent."""
    bucket = int.from_bytes(blake2b(f"{kind}\0{key}".encode(), digest_size=8).digest(), "big") % 20
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def split_of_word(word: str) -> Split:
    """Spelling and letter counting hold out the same words."""
    return split_of("word", word)


def split_of_pair(a: int, b: int) -> Split:
    """The split of a sum, whichever number comes first and whatever is done with the two."""
    return split_of("numbers", f"{min(a, b)},{max(a, b)}")


def split_of_module(module: str) -> Split:
    """Documentation is held out by module, since docstrings of one module resemble each other."""
    return split_of("module", module)
