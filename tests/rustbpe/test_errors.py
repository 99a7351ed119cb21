from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from standins.signals import listen_to_ctrl_c

import rustbpe


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard.parquet"
    texts = [f"document {number} says {number * number}" for number in range(400)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd")
    return path


def _train(path: Path, column: str = "text") -> None:
    rustbpe.Tokenizer().train_from_parquet_files([path], 300, text_column=column)


# --------------------------------------------------------------------------------------------------
# Parquet


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        _train(tmp_path / "gone.parquet")
    with pytest.raises(FileNotFoundError, match=r"gone\.counts"):
        rustbpe.Tokenizer().train_from_counts([tmp_path / "gone.counts"], 300)


@pytest.mark.parametrize("keep", [0, 3, 500, -1])
def test_a_truncated_file_is_named_with_what_to_do(keep: int, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard\.parquet: is not a readable parquet file .*write it again"):
        _train(shard)


def test_damage_inside_a_file_names_the_row_group(shard: Path) -> None:
    chunk = pq.ParquetFile(shard).metadata.row_group(2).column(0)
    content = bytearray(shard.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    shard.write_bytes(content)
    with pytest.raises(OSError, match=r"shard\.parquet: row group 2 cannot be read"):
        _train(shard)


def test_a_missing_column_is_named_beside_those_that_are_there(shard: Path) -> None:
    with pytest.raises(ValueError, match=r"shard\.parquet: has no column 'body'; its columns are text"):
        _train(shard, column="body")


@pytest.mark.parametrize("values", [[1, 2], [b"a", b"b"], [["a"], ["b"]]])
def test_a_column_without_strings_is_named_with_its_type(values: list[object], tmp_path: Path) -> None:
    path = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"text": values}), path)
    with pytest.raises(ValueError, match=r"numbers\.parquet: column 'text' holds .*, not strings"):
        _train(path)


def test_text_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "latin.parquet"
    rows = pa.array([b"fine"] * 150 + [b"caf\xe9"], pa.binary())
    as_text = pa.Array.from_buffers(pa.string(), len(rows), rows.buffers())
    pq.write_table(pa.table({"text": as_text}), path, row_group_size=100)
    with pytest.raises(ValueError, match=r"latin\.parquet: row 150 \(from 0\) is not valid UTF-8"):
        _train(path)


@pytest.mark.parametrize("texts", [[], ["", ""], [None]])
def test_a_shard_without_words_is_refused_and_leaves_no_counts(
    texts: list[str | None], tmp_path: Path
) -> None:
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    with pytest.raises(ValueError, match=rf"empty\.parquet: has no words to count \({len(texts)} rows"):
        rustbpe.count_words(path, tmp_path / "empty.counts")
    assert not (tmp_path / "empty.counts").exists()
    with pytest.raises(ValueError, match="no text to train on"):
        _train(path)


# --------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize("vocab_size", [-1, 0, 255, 2**40, -(2**63)])
def test_a_vocabulary_that_cannot_be_is_refused(vocab_size: int, shard: Path, tmp_path: Path) -> None:
    rustbpe.count_words(shard, tmp_path / "a.counts")
    for train in (
        lambda: rustbpe.Tokenizer().train_from_iterator(["text"], vocab_size),
        lambda: rustbpe.Tokenizer().train_from_parquet_files([shard], vocab_size),
        lambda: rustbpe.Tokenizer().train_from_counts([tmp_path / "a.counts"], vocab_size),
    ):
        with pytest.raises(ValueError, match=f"vocab_size must be from 256 .* got {vocab_size}"):
            train()


@pytest.mark.parametrize("pattern", ["(", r"\p{Nonsense}", "[z-a]", "*"])
def test_a_pattern_that_is_no_regular_expression_is_shown(pattern: str, shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular expression") as error:
        rustbpe.Tokenizer().train_from_iterator(["text"], 300, pattern)
    assert str(error.value).endswith(pattern)
    with pytest.raises(ValueError, match="not a regular expression"):
        rustbpe.count_words(shard, tmp_path / "a.counts", pattern)


def test_a_pattern_that_backtracks_too_far_is_an_error_and_no_panic() -> None:
    text = " " * 1_500_000 + "x"
    with pytest.raises(ValueError, match="the split pattern gave up on a text of 1500001 bytes"):
        rustbpe.Tokenizer().train_from_iterator([text], 300, r"\S+|\s*[\r\n]|\s+(?!\S)|\s+")


@pytest.mark.parametrize("name", ["doc_cap", "max_chars"])
def test_caps_below_one_are_refused(name: str, shard: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        rustbpe.Tokenizer().train_from_parquet_files([shard], 300, **{name: 0})


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no text to train on"):
        rustbpe.Tokenizer().train_from_iterator([], 300)
    with pytest.raises(ValueError, match="no parquet files"):
        rustbpe.Tokenizer().train_from_parquet_files([], 300)
    with pytest.raises(ValueError, match="no counts files"):
        rustbpe.Tokenizer().train_from_counts([], 300)


def test_documents_that_are_no_text_are_named_by_number() -> None:
    with pytest.raises(ValueError, match="document 2 of the iterator is not a string but <class 'int'>"):
        rustbpe.Tokenizer().train_from_iterator(["one", 2], 300)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="document 1 of the iterator is not valid Unicode"):
        rustbpe.Tokenizer().train_from_iterator(["\ud800"], 300)


def test_an_error_of_the_iterator_reaches_the_caller() -> None:
    def broken() -> object:
        yield "one"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        rustbpe.Tokenizer().train_from_iterator(broken(), 300)  # type: ignore[arg-type]


def test_a_failed_training_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["aab aab"], 257)
    before = tokenizer.get_mergeable_ranks()
    with pytest.raises(ValueError, match="no text"):
        tokenizer.train_from_iterator([], 300)
    assert tokenizer.get_mergeable_ranks() == before


def test_more_merges_than_there_are_pairs_gives_what_there_is_and_says_so() -> None:
    tokenizer = rustbpe.Tokenizer()
    with pytest.warns(UserWarning, match="has only 2 pairs to merge, 44 were asked for: .* 258 tokens"):
        tokenizer.train_from_iterator(["abc"], 300)
    assert tokenizer.vocab_size == 258
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.train_from_iterator(["abc"], 258)


# --------------------------------------------------------------------------------------------------
# Counts files


def test_counts_are_described_and_equal_input_gives_equal_bytes(shard: Path, tmp_path: Path) -> None:
    totals = rustbpe.count_words(shard, tmp_path / "a.counts", doc_cap=12, max_chars=10**9)
    rustbpe.count_words(shard, tmp_path / "b.counts", doc_cap=12, max_chars=10**9)
    assert (tmp_path / "a.counts").read_bytes() == (tmp_path / "b.counts").read_bytes()
    assert rustbpe.counts_info(tmp_path / "a.counts") == totals
    assert totals["rows"] == 400
    assert totals["characters"] == totals["bytes"] == 400 * 12
    assert totals["pattern"] == rustbpe.GPT4_PATTERN
    assert (totals["doc_cap"], totals["max_chars"], totals["text_column"]) == (12, 10**9, "text")
    assert len(totals["input_sha256"]) == 64
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.counts", "b.counts", "shard.parquet"]


def test_a_torn_foreign_or_newer_counts_file_is_refused_by_name(shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.counts"
    rustbpe.count_words(shard, path)
    whole = path.read_bytes()
    for content, complaint in (
        (whole[:-100], "torn or damaged"),
        (whole[:200] + b"!" + whole[201:], "torn or damaged"),
        (b"PAR1" + whole, "is not a counts file"),
        (whole[:8] + b"\x03" + whole[9:], "version 3, this rustbpe reads version 2; update rustbpe or count"),
        (whole[:8] + b"\x01" + whole[9:], "version 1, this rustbpe reads version 2; count its shard again"),
    ):
        path.write_bytes(content)
        for read in (rustbpe.counts_info, lambda path: rustbpe.Tokenizer().train_from_counts([path], 300)):
            with pytest.raises(ValueError, match=complaint) as error:
                read(path)
            assert "a.counts" in str(error.value)


def test_counts_made_differently_do_not_mix(shard: Path, tmp_path: Path) -> None:
    rustbpe.count_words(shard, tmp_path / "a.counts", doc_cap=10)
    rustbpe.count_words(shard, tmp_path / "b.counts", doc_cap=20)
    with pytest.raises(ValueError, match=r"b\.counts: was counted with document cap 20, .*a\.counts with 10"):
        rustbpe.Tokenizer().train_from_counts([tmp_path / "a.counts", tmp_path / "b.counts"], 300)


def test_counts_that_cannot_be_written_name_the_file(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.a\.counts"):
        rustbpe.count_words(shard, tmp_path / "nowhere" / "a.counts")


# --------------------------------------------------------------------------------------------------
# Living with other things


_LONG_TRAINING = """
import random, sys, rustbpe
letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=6_000_000)
text = "".join(letters)
words = [text[i:i + 15] for i in range(0, len(text), 15)]
class Words:
    def __iter__(self):
        yield from words
        print("counted", flush=True)
rustbpe.Tokenizer().train_from_iterator(Words(), 1_000_000)
print("finished", flush=True)
"""


def test_ctrl_c_ends_a_training_within_a_second() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _LONG_TRAINING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "counted\n"
    time.sleep(1.5)  # by now it learns merges, outside Python
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert "finished" not in output
    assert time.monotonic() - interrupted < 5  # a second, and room for a busy machine


def test_other_python_threads_run_while_a_tokenizer_trains() -> None:
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=2_000_000))
    texts = [letters[start : start + 2000] for start in range(0, len(letters), 2000)]
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    rustbpe.Tokenizer().train_from_iterator(texts, 5000)
    seconds = time.monotonic() - started
    done.set()
    thread.join()
    assert ticks > seconds * 20  # held by Rust throughout, it would tick about once
