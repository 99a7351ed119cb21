"""Compare our merges with those of rustbpe 0.1.0, token by token in order, on five different corpora.

    python benchmarks/bpe_equality.py --debian
    python benchmarks/bpe_equality.py --kinds random-bytes repetitive

Ours is trained in every way there is: from parquet files, from an iterator, and from counts files in
several orders; on one thread and on --threads. rustbpe 0.1.0 reads the same texts from an iterator. It is
installed from the Python registry into --others where it is not there yet (see bpe_train.py). It spells
its tokens in order and no more, so that is what is compared.

- english, multilingual and code are gathered by bpe_corpus.py's rules, --megabytes of each, and kept in
  --corpora. Without --debian there is nothing multilingual but what the machine happens to have.
- random-bytes: half of the documents read as Latin-1, half as UTF-8 with replacements. Nearly all of its
  pairs are ties.
- repetitive: few letters, motifs that repeat in words of up to 400 letters, documents that repeat too.

A JSON line a training, and one a corpus; the exit status is 1 where any list differs, or where a training
failed. Where a corpus has fewer pairs than --vocab-size asks for, its line says so; the lists must be equal
all the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bpe_corpus import gathered, sources_of, write_parquet
from bpe_train import (
    PATTERN,
    TRAINERS,
    Bench,
    Row,
    Trained,
    add_common_arguments,
    described,
    documents,
    installed,
    measured,
    simd,
    train_rustbpe,
    work_off,
)

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "rustbpe-0.1.0"
GATHERED = ["english", "multilingual", "code"]
SHARDS = 5
SEED = 1

Ways = dict[str, tuple[Row, int]]
"""What each way of training is told, and its threads."""


# -- texts that are made ---------------------------------------------------------------------------


def random_bytes(size_bytes: int) -> Iterator[str]:
    """Random bytes as text, so many of them, in documents of 2,000."""
    generator = random.Random(SEED)
    for start in range(0, size_bytes, 2000):
        data = generator.randbytes(min(2000, size_bytes - start))
        yield data.decode("latin-1") if start % 4000 else data.decode("utf-8", "replace")


def repetitive(size_bytes: int) -> Iterator[str]:
    """Words of motifs of one to seven letters out of four; every third document is one from before."""
    generator = random.Random(SEED)
    known: list[str] = []
    while size_bytes > 0:
        if known and generator.randrange(3) == 0:
            document = generator.choice(known)
        else:
            document = " ".join(repeated(generator) for _ in range(30))
            known.append(document)
        size_bytes -= len(document)
        yield document


def repeated(generator: random.Random) -> str:
    motif = "".join(generator.choices("abcd", k=generator.randrange(1, 8)))
    return motif * generator.randrange(1, 400 // len(motif)) + motif[: generator.randrange(len(motif))]


MADE = {"random-bytes": random_bytes, "repetitive": repetitive}


# -- one run, in a process of its own --------------------------------------------------------------


def train_from_counts(files: list[str], vocab_size: int) -> Trained:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_counts(files, vocab_size)
    return lambda: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()][256:]


# An iterator is given to ours as to rustbpe 0.1.0: the same call.
WAYS = {"parquet": TRAINERS["ours"], "iterator": train_rustbpe, "counts": train_from_counts}


def run_train(job: Row) -> Row:
    """Train job["way"] on job["files"]; the tokens go to job["tokens"], their digest into the row."""
    import pyarrow.parquet as pq  # noqa: F401  before the clock starts

    trained, row = measured(lambda: WAYS[job["way"]](job["files"], job["vocab_size"]))
    return {**row, **described(trained(), Path(job["tokens"]))}


def run_count(job: Row) -> Row:
    """Count the words of job["files"] into job["counts"]."""
    import rustbpe

    def work() -> None:
        for pair in zip(job["files"], job["counts"], strict=True):
            rustbpe.count_words(*pair, pattern=PATTERN)

    return measured(work)[1]


RUNS = {"train": run_train, "count": run_count}


# -- five corpora ----------------------------------------------------------------------------------


def corpus(kind: str, arguments: argparse.Namespace) -> list[str]:
    """The parquet files of a kind of text, made where they are not there; none where nothing was found."""
    folder = arguments.corpora / kind
    files = sorted(folder.glob("shard_*.parquet"))
    if not files:
        texts = made(kind, arguments)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(SHARDS if texts else 0):
            files.append(folder / f"shard_{number:05}.parquet")
            write_parquet(texts[number::SHARDS], files[-1])
    return list(map(str, files))


def made(kind: str, arguments: argparse.Namespace) -> list[bytes]:
    if kind in MADE:
        # In a fifth of the size there is enough to merge, and 0.1.0 takes long for much.
        return [text.encode() for text in MADE[kind](arguments.megabytes * 10**6 // 5)]
    packages = arguments.packages if arguments.debian else None
    texts, _ = gathered(sources_of(kind, packages), arguments.megabytes * 10**6)
    random.Random(SEED).shuffle(texts)
    return texts


def ways(files: list[str], counts: list[str], threads: int) -> Ways:
    """Ours, in every way. The counts files come in order, backwards, and in two orders at random."""
    generator = random.Random(SEED)
    orders = [counts, counts[::-1], *(generator.sample(counts, len(counts)) for _ in range(2))]
    found: Ways = {}
    for number in sorted({1, threads}):
        for way in ("parquet", "iterator"):
            found[f"{way}-{number}"] = ({"way": way, "files": files}, number)
    for index, order in enumerate(orders):
        found[f"counts-{index}"] = ({"way": "counts", "files": order}, threads)
    return found


def compare(bench: Bench, kind: str, files: list[str], arguments: argparse.Namespace) -> Row:
    """Train in all ways; whether the merges are rustbpe 0.1.0's."""
    job = {"run": "train", "vocab_size": arguments.vocab_size}
    shared = {"files": files, "threads": arguments.threads}
    reference = bench.run(f"{kind}-{REFERENCE}", {**job, **shared, "way": "iterator", "library": REFERENCE})
    ours = simd("ours", arguments)
    counts = [str(bench.scratch / f"{kind}-{number}.counts") for number in range(len(files))]
    bench.run(f"{kind}-count", {"run": "count", **shared, "counts": counts}, ours)
    rows = {
        way: bench.run(f"{kind}-{way}", {**job, **told, "threads": threads}, ours)
        for way, (told, threads) in ways(files, counts, arguments.threads).items()
    }
    merges = reference.get("merges")
    different = [
        way for way, row in rows.items() if "error" in row or row["sha256"] != reference.get("sha256")
    ]
    verdict: Row = {
        "corpus": kind,
        "documents": sum(1 for _ in documents(files)),
        "mb": round(sum(len(text.encode()) for text in documents(files)) / 1e6, 1),
        "merges": merges,
        "all_merges": merges == arguments.vocab_size - 256,
        "ways": list(rows),
        "equal": not different,
    }
    if different:
        verdict["different"] = {way: first_difference(bench, kind, way) for way in different}
    return verdict


def first_difference(bench: Bench, kind: str, way: str) -> Any:
    """The number of the first merge that is another one, and both; None where one of them failed."""
    try:
        pairs = itertools.zip_longest(bench.tokens(f"{kind}-{REFERENCE}"), bench.tokens(f"{kind}-{way}"))
    except FileNotFoundError:
        return None
    return next(([number, *pair] for number, pair in enumerate(pairs) if pair[0] != pair[1]), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kinds", nargs="+", choices=[*GATHERED, *MADE], default=[*GATHERED, *MADE])
    parser.add_argument(
        "--megabytes", type=int, default=40, help="of each gathered text; a fifth of each made one"
    )
    parser.add_argument(
        "--corpora", type=Path, default=ROOT / "data/bpe_equality", help="where texts are, or are put"
    )
    parser.add_argument("--debian", action="store_true", help="also fetch Debian's documentation packages")
    parser.add_argument(
        "--packages", type=Path, default=ROOT / "data/bpe_corpus/debian", help="where to keep them"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.job:
        work_off(RUNS)
        return 0
    if not installed([REFERENCE], arguments.others):
        return 1
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(__file__), arguments.others, arguments.json, Path(scratch))
        for kind in arguments.kinds:
            files = corpus(kind, arguments)
            if not files:
                print(f"{kind}: no text was found", file=sys.stderr)
                good = False
                continue
            verdict = compare(bench, kind, files, arguments)
            bench.report(json.dumps(verdict))
            bench.say(f"{kind}: {verdict['merges']} merges, {'equal' if verdict['equal'] else 'DIFFERENT'}")
            good = good and verdict["equal"] and "error" not in {key for row in bench.rows for key in row}
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
