"""Encode held-out text with several libraries and one vocabulary, alternately, and compare speed and ids.

    python benchmarks/bpe_encode.py data/bpe_corpus/english --threads 1 2 --rounds 5

The vocabulary is trained by ours on the corpus's shards, with GPT-4's own split pattern, because gigatoken
knows no other that fits. Every run is a process of its own: it loads the vocabulary, encodes a megabyte of
other text, then the held-out text once, which is what is timed. Documents go in as Python strings, and ids
come out as what the library gives: lists, or an array (`ours-encode_into`, `gigatoken`). All ids must be
tiktoken's. Each run is a JSON line; a table of medians for each number of threads comes last, and how many
times as fast as with the first number each was with the others, in the median of the rounds.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from bpe_train import (
    Bench,
    Row,
    add_common_arguments,
    documents,
    installed,
    measured,
    speed,
    stand_ins,
    work_off,
)

from nanochat.recipes import gpt4_pattern

PATTERN = gpt4_pattern(r"\p{N}{1,3}")
WARM_UP_BYTES = 1_000_000

Ranks = dict[bytes, int]
Ids = Any  # lists of ids, or an array of all
Encode = Callable[[list[str]], Ids]


# -- one run, in a process of its own --------------------------------------------------------------


def read_ranks(job: Row) -> Ranks:
    """The vocabulary: a token in base64 and its id in each line."""
    lines = Path(job["ranks"]).read_text().splitlines()
    return {base64.b64decode(token): int(number) for token, number in map(str.split, lines)}


def our_tokenizer(job: Row) -> Any:
    import rustbpe

    if hasattr(rustbpe.Tokenizer, "from_ranks"):
        return rustbpe.Tokenizer.from_ranks(read_ranks(job), PATTERN)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_counts(job["counts"], job["vocab_size"])
    return tokenizer


def ours_encode(job: Row) -> Encode:
    tokenizer = our_tokenizer(job)
    return lambda texts: [tokenizer.encode(text) for text in texts]


def ours_encode_batch(job: Row) -> Encode:
    tokenizer = our_tokenizer(job)
    return lambda texts: tokenizer.encode_batch(texts, threads=job["threads"])


def ours_encode_into(job: Row) -> Encode:
    import numpy as np

    tokenizer = our_tokenizer(job)
    # A token has at least a byte; the room is made, but not touched, before the clock starts.
    room = np.empty(job["max_bytes"], np.uint16 if job["vocab_size"] <= 1 << 16 else np.uint32)
    return lambda texts: room[: tokenizer.encode_into(texts, room, threads=job["threads"])]


def tiktoken_encode(job: Row) -> Encode:
    import tiktoken

    encoding = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=read_ranks(job), special_tokens={})
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=job["threads"])


def huggingface_encode(job: Row) -> Encode:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(job["tokenizer_json"])
    return lambda texts: [
        encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def gigatoken_encode(job: Row) -> Encode:
    tokenizer = gigatoken_tokenizer(job)
    return lambda texts: tokenizer.encode_batch(texts, parallel=job["threads"] > 1)


def gigatoken_encode_list(job: Row) -> Encode:
    tokenizer = gigatoken_tokenizer(job)
    return lambda texts: tokenizer.encode_batch_list(texts, parallel=job["threads"] > 1)


def gigatoken_tokenizer(job: Row) -> Any:
    import gigatoken

    return gigatoken.Tokenizer.from_tiktoken(job["ranks"], pretokenizer="cl100k")


# Name: the library to install, how its encoder is made, and the method of ours that it needs.
ENCODERS: dict[str, tuple[str, Callable[[Row], Encode], str | None]] = {
    "tiktoken": ("tiktoken", tiktoken_encode, None),
    "ours-encode": ("ours", ours_encode, "encode"),
    "ours-encode_batch": ("ours", ours_encode_batch, "encode_batch"),
    "ours-encode_into": ("ours", ours_encode_into, "encode_into"),
    "huggingface": ("huggingface", huggingface_encode, None),
    "gigatoken": ("gigatoken", gigatoken_encode, None),
    "gigatoken-list": ("gigatoken", gigatoken_encode_list, None),
}


def run_encode(job: Row) -> Row:
    """Encode the held-out documents once."""
    warm_up, _ = some_documents(job["files"][:1], WARM_UP_BYTES)
    texts, size_bytes = some_documents([job["held_out"]], job["max_bytes"])
    encode = ENCODERS[job["implementation"]][1](job)
    encode(warm_up)
    ids, row = measured(lambda: encode(texts))
    tokens, digest = described(ids)
    return {**row, **speed(size_bytes, row), "tokens": tokens, "sha256": digest}


def some_documents(files: list[str], max_bytes: int) -> tuple[list[str], int]:
    """The first documents that fit, and their size in bytes of UTF-8."""
    texts, size_bytes = [], 0
    for text in documents(files):
        if size_bytes + len(text.encode()) > max_bytes:
            break
        texts.append(text)
        size_bytes += len(text.encode())
    return texts, size_bytes


def described(ids: Ids) -> tuple[int, str]:
    """How many ids, and the digest of all in a row."""
    import numpy as np

    if not isinstance(ids, list | np.ndarray):
        ids = ids.to_list()  # an awkward array
    if isinstance(ids, list):
        ids = np.concatenate([np.asarray(each, np.uint32) for each in ids])
    return len(ids), hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()


def run_vocabulary(job: Row) -> Row:
    """Count the shards' words into job["counts"], learn the vocabulary, and write it."""
    import rustbpe

    def work() -> Any:
        for path, counts in zip(job["files"], job["counts"], strict=True):
            rustbpe.count_words(path, counts, pattern=PATTERN)
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_counts(job["counts"], job["vocab_size"])
        return tokenizer

    tokenizer, row = measured(work)
    ranks = {bytes(token): number for token, number in tokenizer.get_mergeable_ranks()}
    lines = (f"{base64.b64encode(token).decode()} {number}\n" for token, number in ranks.items())
    Path(job["ranks"]).write_text("".join(lines))
    Path(job["tokenizer_json"]).write_text(json.dumps(tokenizer_json(ranks)))
    return {**row, "vocab_size": len(ranks)}


def tokenizer_json(ranks: Ranks) -> dict[str, Any]:
    """The vocabulary as Hugging Face's tokenizer.json."""
    letters = stand_ins()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [merge_of(token, ranks) for token, number in ranks.items() if number >= 256]
    return {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {spelled(token): number for token, number in ranks.items()},
            "merges": [[spelled(left), spelled(right)] for left, right in merges],
        },
    }


def merge_of(token: bytes, ranks: Ranks) -> tuple[bytes, bytes]:
    """The two tokens that `token` was merged from: what is left of it when all older merges are done."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


RUNS = {"vocabulary": run_vocabulary, "encode": run_encode}


# -- many runs -------------------------------------------------------------------------------------


def usable(names: list[str], others: Path) -> list[str]:
    """Those of `names` that are there: methods of ours that the installed rustbpe has, and what installs."""
    import rustbpe

    libraries = installed(sorted({ENCODERS[name][0] for name in names}), others)
    result = []
    for name in names:
        library, _, method = ENCODERS[name]
        if library in libraries and (method is None or hasattr(rustbpe.Tokenizer, method)):
            result.append(name)
    return result


def gain(name: str, rows: list[Row], first: list[Row]) -> float:
    """How many times as fast as in `first` an implementation is: the median of round by round."""
    rounds = [
        (before["wall_s"], now["wall_s"])
        for before, now in zip(first, rows, strict=True)
        if now["name"] == name and "error" not in before | now
    ]
    return statistics.median(before / now for before, now in rounds) if rounds else math.nan


def compare_ids(bench: Bench) -> bool:
    """Tell whose ids are not tiktoken's; whether all are."""
    digests = {row["name"]: row["sha256"] for row in bench.rows if "sha256" in row}
    wrong = [name for name, digest in digests.items() if digest != digests.get("tiktoken", digest)]
    bench.say(f"ids that differ from tiktoken's: {', '.join(wrong) or 'none'}")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, nargs="?", help="folder that bpe_corpus.py has made")
    parser.add_argument("--shards", type=int, help="train on only so many of the corpus's shards")
    parser.add_argument("--megabytes", type=float, default=10, help="held-out text to encode")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="cores and threads of a run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    parser.add_argument("--implementations", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.job:
        work_off(RUNS)
        return 0
    files = sorted(map(str, arguments.corpus.glob("shard_*.parquet"))) if arguments.corpus else []
    files = files[: arguments.shards]
    held_out = arguments.corpus / "held_out.parquet" if files else None
    if held_out is None or not held_out.exists():
        parser.error("there is no corpus: name a folder that benchmarks/bpe_corpus.py has made")
    names = usable(arguments.implementations, arguments.others)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        job = {
            "files": files,
            "held_out": str(held_out),
            "max_bytes": int(arguments.megabytes * 1e6),
            "vocab_size": arguments.vocab_size,
            "counts": [str(scratch / f"{number:05}.counts") for number in range(len(files))],
            "ranks": str(scratch / "vocabulary.tiktoken"),
            "tokenizer_json": str(scratch / "tokenizer.json"),
        }

        def bench() -> Bench:
            return Bench(Path(__file__), arguments.others, arguments.json, scratch)

        trained = bench().run("vocabulary", {**job, "run": "vocabulary", "threads": max(arguments.threads)})
        if "error" in trained:
            return 1
        # A vocabulary of another size than asked for: the corpus is too small for it.
        job["vocab_size"] = trained["vocab_size"]
        # One run of each after the other, so that a machine which changes its pace does so for all.
        benches = {threads: bench() for threads in arguments.threads}
        for number in range(arguments.rounds):
            for (threads, runs), name in product(benches.items(), names):
                library = ENCODERS[name][0]
                environment = {"RUSTBPE_SIMD": arguments.simd} if arguments.simd and library == "ours" else {}
                run = {"run": "encode", "library": library, "threads": threads, "round": number}
                runs.run(name, {**job, **run}, environment)
        for threads, runs in benches.items():
            runs.say(f"\nthreads: {threads}")
            runs.say(runs.table(["mb_per_s", "wall_s", "cpu_s", "peak_mb"], "tiktoken"))
            first = arguments.threads[0]
            if threads != first:
                for name in names:
                    times = gain(name, runs.rows, benches[first].rows)
                    runs.say(f"{name}: {times:.2f} times as fast as with {first}")
            good = compare_ids(runs) and not any("error" in row for row in runs.rows) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
