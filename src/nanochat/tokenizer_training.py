"""Training the tokenizer, in two steps: count the words of each shard, then learn the merges.

The caps of a recipe are applied so that counts stay exactly additive. What is counted of a shard depends
on that shard and the recipe's tokenizer section alone, never on the shards before it:

- `document_cap` cuts every document.
- `max_chars`, the characters in all, is divided evenly: every one of the section's `shards` has a budget of
  max_chars // shards characters, taken from its start. So no more than max_chars are ever counted, shards
  can be counted in any order and on any machine, and one more shard costs one count while its budget stays.

(nanochat reads its shards in order and stops after max_chars; with its 2 billion characters over 8 shards of
about 250 million, whose documents the cap of 10,000 characters shortens, neither way drops anything.)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rustbpe
from nanochat.recipes import SPECIAL_TOKENS
from nanochat.recipes import Tokenizer as TokenizerSection
from nanochat.store.digests import digest_json
from nanochat.tokenizer import Tokenizer

_TOTALS = ("rows", "characters", "bytes", "words", "unique_words")


def characters_per_shard(section: TokenizerSection) -> int:
    """The budget of each of the section's shards."""
    return max(1, section.max_chars // section.shards)


def counting_digest(section: TokenizerSection) -> str:
    """Hex digest of what decides the counts of a given shard: sections that share it share the files."""
    return digest_json(
        {
            "counts_version": rustbpe.COUNTS_VERSION,
            "pattern": section.pattern,
            "document_cap": section.document_cap,
            "characters_per_shard": characters_per_shard(section),
        }
    )


def count_shard(
    parquet: str | os.PathLike[str], destination: str | os.PathLike[str], section: TokenizerSection
) -> dict[str, int]:
    """Count a shard's words into a counts file, which is whole or not there.

    Returns rows, characters and bytes that were looked at (after the caps), words and unique words.
    Raises ValueError or OSError naming the file: unreadable, no `text` column, not text, no words in it.
    """
    destination = Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    totals = rustbpe.count_words(
        parquet,
        destination,
        section.pattern,
        doc_cap=section.document_cap,
        max_chars=characters_per_shard(section),
    )
    return _totals(totals)


def counted_sha256(counts: str | os.PathLike[str]) -> str:
    """The digest of the shard's bytes that a counts file was made from."""
    return str(rustbpe.counts_info(counts)["input_sha256"])


def train_tokenizer(
    section: TokenizerSection,
    counts_paths: Sequence[str | os.PathLike[str]],
    provenance: Mapping[str, Any],
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Tokenizer:
    """Learn section.vocab_size ids, special tokens included, from counts files in any order.

    progress: called with the merges learned and all of them, ten times a second.

    Where the text has fewer pairs to merge, the vocabulary is smaller and a UserWarning says so. The
    provenance is what is given, and what was counted. Raises ValueError naming the file that was counted
    in another way, is torn, or is no counts file.
    """
    totals = dict.fromkeys(_TOTALS, 0)
    for path in counts_paths:
        info = rustbpe.counts_info(path)
        _require_same_counting(path, info, section)
        for name, value in _totals(info).items():
            totals[name] += value

    trainer = rustbpe.Tokenizer()
    ordinary = section.vocab_size - len(SPECIAL_TOKENS)
    with warnings.catch_warnings():
        # rustbpe's own warning does not know of the special tokens; ours follows.
        warnings.simplefilter("ignore", UserWarning)
        # Shards share most of their words, so that their sum would say nothing.
        totals["unique_words"] = trainer.train_from_counts(
            list(counts_paths), ordinary, progress=lambda phase, done, of: progress(done, of)
        )
    tokenizer = Tokenizer(
        pattern=trainer.get_pattern(),
        ranks=[token for token, _ in trainer.get_mergeable_ranks()],
        provenance={
            **provenance,
            "trained_on": {
                **totals,
                "shards": len(counts_paths),
                "document_cap": section.document_cap,
                "characters_per_shard": characters_per_shard(section),
            },
            "merges": trainer.vocab_size - 256,
            "merges_asked": ordinary - 256,
        },
    )
    if tokenizer.vocab_size < section.vocab_size:
        warnings.warn(
            f"the text of {len(counts_paths)} shard(s) ({totals['bytes']} bytes) has only "
            f"{trainer.vocab_size - 256} pairs to merge: the vocabulary is {tokenizer.vocab_size} ids "
            f"instead of {section.vocab_size}; name more shards or a smaller vocab_size",
            stacklevel=2,
        )
    return tokenizer


def _totals(info: Mapping[str, Any]) -> dict[str, int]:
    return {name: info[name] for name in _TOTALS}


def _require_same_counting(
    path: str | os.PathLike[str], info: Mapping[str, Any], section: TokenizerSection
) -> None:
    expected = {
        "pattern": section.pattern,
        "doc_cap": section.document_cap,
        "max_chars": characters_per_shard(section),
    }
    for name, value in expected.items():
        if info[name] != value:
            raise ValueError(
                f"{os.fspath(path)}: was counted with {name} {info[name]!r}, the recipe's tokenizer section "
                f"has {value!r}; count the shard again"
            )
