"""Train on many counts files, and see what memory that takes.

    python benchmarks/bpe_counts.py --files 200 --words 1000000

Every file counts so many different words. How many there are in all follows from how a vocabulary grows with
its text: n times the text has n^GROWTH times the words (Heaps' law). The default is what six shards of 50 MB
of the English corpus of bpe_corpus.py have: 656,000 words together, 275,000 each in the mean, so
ln(656 / 275) / ln(6). With a growth of 1, no two files have a word in common.

Word number r is in a file with the probability 1 - exp(-(R / r)^(1 / GROWTH)), which gives that law at any
size. Words are a space and eight letters. One JSON line comes out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bpe_train import peak_bytes

from nanochat.recipes import gpt4_pattern

PATTERN = gpt4_pattern(r"\p{N}{1,2}")
LETTERS = 8
WORDS_A_DOCUMENT = 10_000


def write_counts(path: Path, *, words: int, growth: float, seed: int) -> None:
    """A counts file of about so many words that occur once to four times each."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    import rustbpe

    generator = np.random.default_rng(seed)
    if growth >= 1:
        numbers = np.arange(seed * words, (seed + 1) * words)
    else:
        power = 1 / growth
        # The sum of the probabilities over all numbers is R * Gamma(1 - GROWTH).
        scale = words / math.gamma(1 - growth)
        head = np.arange(1, int(20 * scale))
        near = head[generator.random(len(head)) < -np.expm1(-((scale / head) ** power))]
        # Further on the probability is small, and hardly more than (R / r)^power.
        first = int(20 * scale)
        mean = scale**power * first ** (1 - power) / (power - 1)
        far = first * generator.random(generator.poisson(mean)) ** (-1 / (power - 1))
        numbers = np.concatenate([near, np.unique(far.astype(np.int64))])
    spelled = np.full((len(numbers), 1 + LETTERS), ord(" "), np.uint8)
    for place in range(LETTERS):
        # Multiplied by a number without a factor in common: neighbours do not begin alike.
        numbers, letter = (
            np.divmod(numbers, 26) if place else np.divmod(numbers * 1_000_003 % 26**LETTERS, 26)
        )
        spelled[:, 1 + place] = letter + ord("a")
    spelled = np.repeat(spelled, generator.integers(1, 5, len(spelled)), axis=0)
    documents = [
        spelled[start : start + WORDS_A_DOCUMENT].tobytes().decode()
        for start in range(0, len(spelled), WORDS_A_DOCUMENT)
    ]
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.parquet"
        pq.write_table(pa.table({"text": documents}), shard)
        rustbpe.count_words(shard, path, pattern=PATTERN)


def train(paths: list[str], vocab_size: int) -> dict[str, float]:
    """Learn merges from counts files, and say what that took."""
    import rustbpe

    started = time.perf_counter()
    unique = rustbpe.Tokenizer().train_from_counts(paths, vocab_size)
    peak = peak_bytes()
    return {
        "unique_words": unique,
        "wall_s": round(time.perf_counter() - started, 1),
        "peak_mb": round(peak / 1e6),
        "bytes_per_word": round(peak / unique, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--words", type=int, default=1_000_000, help="different words of a file")
    parser.add_argument("--growth", type=float, default=0.485, help="exponent of Heaps' law, 1 at most")
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(train(**json.load(sys.stdin))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number:05}.counts" for number in range(arguments.files)]
        for number, path in enumerate(paths):
            write_counts(path, words=arguments.words, growth=arguments.growth, seed=number)
        job = {"paths": [str(path) for path in paths], "vocab_size": arguments.vocab_size}
        # In a process of its own, whose memory is that of the training alone.
        trained = subprocess.run(
            [sys.executable, __file__, "--job"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=True,
        )
    settings = {"files": arguments.files, "words": arguments.words, "growth": arguments.growth}
    print(json.dumps({**settings, **json.loads(trained.stdout)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
