"""Train tokenizers of several libraries on one corpus, alternately, and compare time, memory and merges.

    python benchmarks/bpe_train.py data/bpe_corpus/english --vocab-size 65536 --threads 2 --rounds 3
    python benchmarks/bpe_train.py data/bpe_corpus/english --phase count
    python benchmarks/bpe_train.py --counts 100 --unique 1000000

Every run is a process of its own, from parquet files on disk to merges in memory, reading included, but
not the start of Python. The libraries take turns, so that a busy minute of the machine meets all of them;
judge ratios, not seconds, and on a busy machine those of CPU seconds. Each run is a JSON line; a table of
medians comes last.

`ours` is the environment's `rustbpe`. The others are not in it: they are installed from the Python
registry into --others, one folder each (one of them has the same name as ours). They differ:

- `rustbpe-0.1.0`, what nanochat uses, must give the same merges as ours.
- `huggingface` breaks ties by another order of the bytes; the share of equal merges is reported, and
  `ours-huggingface-ties`, where our Tokenizer has that order, must give the same merges.
- `gigatoken` splits by GPT-2's pattern whatever one asks for, so its merges are not compared.

--phase count measures our counting of words alone, with one thread and with --threads, against reading
the text column alone. --counts N --unique M measures the reduce: it makes N counts files of M unique
words each, half of them in every file, and trains on them.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.recipes import gpt4_pattern

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PATTERN = gpt4_pattern(r"\p{N}{1,2}")

# What is installed for each of the others. Versions are fixed: a figure names what it was measured with.
OTHERS = {
    "rustbpe-0.1.0": "rustbpe==0.1.0",
    "huggingface": "tokenizers==0.23.3",
    "gigatoken": "gigatoken==0.10.0",
}
IMPLEMENTATIONS = ["ours", "ours-huggingface-ties", *OTHERS]

# Of the unique words of a synthetic counts file: this share is in every file, the rest in no other.
SHARED_WORDS = 0.5

Row = dict[str, Any]


# -- one run, in a process of its own --------------------------------------------------------------


def documents(files: list[str]) -> Iterator[str]:
    """The texts of parquet files as nanochat reads them, a row group at a time."""
    import pyarrow.parquet as pq

    for path in files:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=["text"]).column("text").to_pylist()


Trained = Callable[[], list[bytes]]
"""Spells the merges of a trained tokenizer: the bytes of every token after the 256 bytes, in order."""


def train_ours(files: list[str], vocab_size: int, **options: Any) -> Trained:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_parquet_files(files, vocab_size, pattern=PATTERN, **options)
    return lambda: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()][256:]


def train_ours_with_their_ties(files: list[str], vocab_size: int) -> Trained:
    return train_ours(files, vocab_size, ties="huggingface")


def train_rustbpe(files: list[str], vocab_size: int) -> Trained:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(documents(files), vocab_size, pattern=PATTERN)
    return lambda: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()][256:]


def train_huggingface(files: list[str], vocab_size: int) -> Trained:
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(documents(files), trainer)

    def merges() -> list[bytes]:
        byte_of = {stand_in: byte for byte, stand_in in enumerate(stand_ins())}
        pairs = json.loads(tokenizer.to_str())["model"]["merges"]
        return [bytes(byte_of[character] for character in left + right) for left, right in pairs]

    return merges


def stand_ins() -> list[str]:
    """GPT-2's visible stand-in for each byte: printable ones are themselves, the rest U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def train_gigatoken(files: list[str], vocab_size: int) -> Trained:
    import gigatoken

    source = gigatoken.ParquetFileSource(files, "text")
    _, merges = gigatoken.train_bpe(source, vocab_size, [])
    return lambda: [left + right for left, right in merges]


TRAINERS: dict[str, Callable[[list[str], int], Trained]] = {
    "ours": train_ours,
    "ours-huggingface-ties": train_ours_with_their_ties,
    "rustbpe-0.1.0": train_rustbpe,
    "huggingface": train_huggingface,
    "gigatoken": train_gigatoken,
}


def measured(work: Callable[[], Any]) -> tuple[Any, Row]:
    """The result of `work`, and what it took: seconds, CPU seconds, the peak of this process's memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    row = {
        "wall_s": round(time.perf_counter() - wall, 6),
        "cpu_s": round(time.process_time() - cpu, 6),
        "peak_mb": round(peak_bytes() / 1e6),
    }
    return result, row


def peak_bytes() -> int:
    """The most memory that this process held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's figure, this one starts anew with the program, not with its parent's memory.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def run_train(job: Row) -> Row:
    """Train on job["files"]; the tokens go to job["tokens"], their digest into the row."""
    import pyarrow.parquet as pq  # noqa: F401  before the clock starts

    trainer = TRAINERS[job["implementation"]]
    trained, row = measured(lambda: trainer(job["files"], job["vocab_size"]))
    return {**row, **described(trained(), Path(job["tokens"]))}


def run_reduce(job: Row) -> Row:
    """Train on counts files."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    _, row = measured(lambda: tokenizer.train_from_counts(job["files"], job["vocab_size"]))
    tokens = [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()][256:]
    return {**row, **described(tokens, Path(job["tokens"]))}


def described(tokens: list[bytes], path: Path) -> Row:
    path.write_text("\n".join(token.hex() for token in tokens))
    return {"merges": len(tokens), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def run_count(job: Row) -> Row:
    """Count every file's words into a counts file of its own."""
    import pyarrow.parquet as pq  # noqa: F401  before the clock starts

    import rustbpe

    def work() -> list[Any]:
        counts = [f"{job['tokens']}.{number}" for number in range(len(job["files"]))]
        return [
            rustbpe.count_words(*paths, pattern=PATTERN) for paths in zip(job["files"], counts, strict=True)
        ]

    infos, row = measured(work)
    return {
        **row,
        "words": sum(info["words"] for info in infos),
        **speed(sum(info["bytes"] for info in infos), row),
    }


def run_read(job: Row) -> Row:
    """Read the text column into Arrow arrays, and do nothing with it."""
    import pyarrow.parquet as pq

    def work() -> int:
        size_bytes = 0
        for path in job["files"]:
            size_bytes += pq.read_table(path, columns=["text"]).nbytes
        return size_bytes

    size_bytes, row = measured(work)
    return {**row, **speed(size_bytes, row)}


def speed(size_bytes: int, row: Row) -> Row:
    return {"mb": round(size_bytes / 1e6, 1), "mb_per_s": round(size_bytes / 1e6 / row["wall_s"], 1)}


RUNS = {"train": run_train, "reduce": run_reduce, "count": run_count, "read": run_read}


def work_off(runs: Mapping[str, Callable[[Row], Row]]) -> None:
    """What the process of a run does: take a job from its input, do that one of `runs`, print the row."""
    job = json.load(sys.stdin)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first = job.get("round", len(cores) - 1) % len(cores)  # not the same core every time
        os.sched_setaffinity(0, (cores[first:] + cores[:first])[: job["threads"]])
    import pyarrow as pa

    pa.set_cpu_count(job["threads"])
    pa.set_io_thread_count(job["threads"])
    print(json.dumps(runs[job["run"]](job)))


# -- many runs -------------------------------------------------------------------------------------


class Bench:
    """Runs jobs, each in a process of its own, and keeps what came out."""

    def __init__(self, script: Path, others: Path, json_file: Path | None, scratch: Path) -> None:
        self.rows: list[Row] = []
        self.scratch = scratch
        self._script = script
        self._others = others
        self._json_file = json_file

    def run(self, name: str, job: Row, environment: dict[str, str] | None = None) -> Row:
        """One run of `name`, a way to use job["library"]. Where it failed, its row has an `error`."""
        threads = job["threads"]
        job = {"implementation": name, "tokens": str(self.scratch / f"{name}.tokens"), **job}
        result = subprocess.run(
            [sys.executable, self._script, "--job"],
            input=json.dumps(job),
            env={**os.environ, **self._environment(job.get("library", name), threads), **(environment or {})},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            measures = {"error": result.stderr.strip().splitlines()[-1:]}
        else:
            measures = json.loads(result.stdout.splitlines()[-1])
        row = {"name": name, "threads": threads, **measures, "load": round(os.getloadavg()[0], 2)}
        self.rows.append(row)
        self.report(json.dumps(row))
        return row

    def tokens(self, name: str) -> list[str]:
        """The merges of the last training of `name`, in order."""
        return (self.scratch / f"{name}.tokens").read_text().split("\n")

    def table(self, columns: list[str], base: str) -> str:
        """Medians of every name's runs, and its times as multiples of `base`'s."""
        timed = ["wall_s", "cpu_s"]
        good = [row for row in self.rows if "error" not in row]
        names = list(dict.fromkeys(row["name"] for row in good))
        median = {
            name: {
                column: statistics.median(values)
                for column in {*columns, *timed}
                if (values := [row[column] for row in good if row["name"] == name and column in row])
            }
            for name in names
        }
        lines = [["", *columns, *(f"{column} ÷ {base}" for column in timed)]]
        for name in names:
            cells = [figure(median[name].get(column)) for column in columns]
            ratios = [median[name][column] / median[base][column] for column in timed if base in median]
            lines.append(
                [name, *cells, *(f"{ratio:.2f}" for ratio in ratios), *[""] * (len(timed) - len(ratios))]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
        )

    def say(self, text: str) -> None:
        """For people: kept apart from the JSON lines."""
        print(text, file=sys.stdout if self._json_file else sys.stderr, flush=True)

    def report(self, line: str) -> None:
        if self._json_file is None:
            print(line, flush=True)
            return
        with self._json_file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _environment(self, library: str, threads: int) -> dict[str, str]:
        result = {
            "RAYON_NUM_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
            # numpy comes along with pyarrow, and its threads would spin at the start of what is timed.
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        }
        if library in OTHERS:
            inherited = os.environ.get("PYTHONPATH", "")
            result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self._others / library), inherited]))
        return result


def figure(value: float | None) -> str:
    """Four digits, or all before the point; nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def installed(names: list[str], others: Path) -> list[str]:
    """Those of `names` that are ours or could be installed; the rest are reported."""
    return [name for name in names if name not in OTHERS or install(OTHERS[name], others / name)]


def install(requirement: str, folder: Path) -> bool:
    if folder.exists():
        return True
    uv = shutil.which("uv", path=os.pathsep.join([str(ROOT / ".tools/bin"), os.environ.get("PATH", "")]))
    installer = (
        [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    )
    command = [*installer, "--quiet", "--target", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{requirement} cannot be installed: {result.stderr.strip()[-300:]}", file=sys.stderr)
    return result.returncode == 0


def knows_their_ties() -> bool:
    """Whether our Tokenizer can break ties as Hugging Face does."""
    import rustbpe

    return "ties" in inspect.signature(rustbpe.Tokenizer.train_from_parquet_files).parameters


def compare_merges(bench: Bench) -> bool:
    """Tell how the merges agree; whether those that must be equal are."""
    last = {row["name"]: row for row in bench.rows if "error" not in row}
    digests = {name: {row.get("sha256") for row in bench.rows if row["name"] == name} for name in last}
    must_agree = [("ours", "rustbpe-0.1.0"), ("ours-huggingface-ties", "huggingface")]
    agree = True
    for left, right in [*must_agree, ("ours", "huggingface")]:
        if left not in last or right not in last:
            continue
        equal = len(digests[left] | digests[right]) == 1
        position, anywhere = shares_equal(bench.tokens(left), bench.tokens(right))
        bench.say(
            f"merges of {left} and {right}: {'equal' if equal else 'different'}, "
            f"{position:.2%} at the same position, {anywhere:.2%} at any"
        )
        agree = agree and (equal or (left, right) not in must_agree)
    return agree


def shares_equal(left: list[str], right: list[str]) -> tuple[float, float]:
    """The shares of `left`'s tokens that `right` has at the same position, and at any."""
    position = sum(a == b for a, b in zip(left, right, strict=False))
    return position / len(left), len(set(left) & set(right)) / len(set(left))


def bench_training(bench: Bench, arguments: argparse.Namespace, files: list[str]) -> bool:
    names = installed(arguments.implementations, arguments.others)
    if "ours-huggingface-ties" in names and not knows_their_ties():
        names.remove("ours-huggingface-ties")
    job = {"run": "train", "files": files, "vocab_size": arguments.vocab_size, "threads": arguments.threads}
    for _ in range(arguments.rounds):
        for name in names:
            bench.run(name, job, simd(name, arguments))
    bench.say(bench.table(["wall_s", "cpu_s", "peak_mb"], "ours"))
    return compare_merges(bench)


def bench_counting(bench: Bench, arguments: argparse.Namespace, files: list[str]) -> bool:
    for _ in range(arguments.rounds):
        for threads in sorted({1, arguments.threads}):
            job = {"files": files, "threads": threads}
            bench.run(f"count-{threads}", {"run": "count", **job}, simd("ours", arguments))
            bench.run(f"read-{threads}", {"run": "read", **job})
    bench.say(bench.table(["wall_s", "cpu_s", "peak_mb", "mb_per_s"], f"count-{arguments.threads}"))
    return True


def bench_reducing(bench: Bench, arguments: argparse.Namespace) -> bool:
    files = [synthetic_counts(bench.scratch, n, arguments.unique) for n in range(arguments.counts)]
    size_bytes = sum(Path(file).stat().st_size for file in files)
    bench.say(f"{len(files)} counts files, {size_bytes / 1e6:.0f} MB")
    job = {"run": "reduce", "files": files, "vocab_size": arguments.vocab_size, "threads": arguments.threads}
    for _ in range(arguments.rounds):
        bench.run("ours", job)
    bench.say(bench.table(["wall_s", "cpu_s", "peak_mb"], "ours"))
    return True


def simd(name: str, arguments: argparse.Namespace) -> dict[str, str]:
    """The instruction set that ours is held to."""
    return {"RUSTBPE_SIMD": arguments.simd} if arguments.simd and name.startswith("ours") else {}


def synthetic_counts(scratch: Path, number: int, unique: int) -> str:
    """A counts file of `unique` words, of which SHARED_WORDS are in the file of every number."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    import rustbpe

    shared = int(unique * SHARED_WORDS)
    own = shared + number * (unique - shared)
    numbers = np.concatenate([np.arange(shared), np.arange(own, own + unique - shared)])
    text = synthetic_words(numbers)
    size = 1000 * 8
    rows = [text[start : start + size] for start in range(0, len(text), size)]
    parquet, counts = scratch / "words.parquet", scratch / f"{number:05}.counts"
    pq.write_table(pa.table({"text": rows}), parquet)
    rustbpe.count_words(parquet, counts, pattern=PATTERN)
    return str(counts)


def synthetic_words(numbers: np.ndarray) -> str:
    """A space and seven letters for each number, different for every one below 26^7; neighbours do not
    look alike."""
    import numpy as np

    scattered = numbers.astype(np.uint64) * 2_654_435_761 % 26**7  # the factor is prime to 26
    words = np.full((len(numbers), 8), ord(" "), dtype=np.uint8)
    for column in range(1, 8):
        scattered, letters = np.divmod(scattered, 26)
        words[:, column] = letters + ord("a")
    return words.tobytes().decode("ascii")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks of training and of encoding are both told."""
    parser.add_argument("--vocab-size", type=int, default=65_536, help="the 256 bytes and the merges")
    parser.add_argument("--simd", help="RUSTBPE_SIMD for ours: the instruction set to use")
    parser.add_argument("--json", type=Path, help="add the JSON lines to this file, not to the output")
    parser.add_argument(
        "--others", type=Path, default=ROOT / "data/bpe_others", help="where they are installed"
    )
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, nargs="?", help="folder with shard_*.parquet (bpe_corpus.py)")
    parser.add_argument("--shards", type=int, help="only so many of the corpus's shards")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores and threads of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--phase", choices=["train", "count"], default="train")
    parser.add_argument("--counts", type=int, help="train on so many synthetic counts files instead")
    parser.add_argument("--unique", type=int, default=1_000_000, help="unique words of each of them")
    add_common_arguments(parser)
    arguments = parser.parse_args()
    if arguments.job:
        work_off(RUNS)
        return 0
    files = sorted(map(str, arguments.corpus.glob("shard_*.parquet"))) if arguments.corpus else []
    files = files[: arguments.shards]
    if not files and not arguments.counts:
        parser.error("there are no shards: name a folder that benchmarks/bpe_corpus.py has made")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(__file__), arguments.others, arguments.json, Path(scratch))
        if arguments.counts:
            good = bench_reducing(bench, arguments)
        elif arguments.phase == "count":
            good = bench_counting(bench, arguments, files)
        else:
            good = bench_training(bench, arguments, files)
    return 0 if good and not any("error" in row for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
