from __future__ import annotations

import importlib.util
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat.evaluation.tokenizer_quality import evaluation_texts
from nanochat.recipes import gpt4_pattern

PATTERN = gpt4_pattern(r"\p{N}{1,2}")

WriteParquet = Callable[..., Path]


def _reference_trainer() -> ModuleType:
    path = Path(__file__).with_name("reference_trainer.py")
    spec = importlib.util.spec_from_file_location("reference_trainer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


learn_slowly = _reference_trainer().learn


def _random_characters(seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(chr(generator.randrange(32, 0x250)) for _ in range(400)) for _ in range(20)]


CORPORA: dict[str, list[str]] = {
    **{domain: [text.text] for domain, text in evaluation_texts().items()},
    "everything": [text.text for text in evaluation_texts().values()],
    "repetitive": ["aaaa aaa aa abababab ababa " * 40, "banana bananas " * 30, "\n\n\n   \n x" * 20],
    "few letters": ["".join(random.Random(7).choices("ab ", k=4000))],
    "random characters": _random_characters(1),
    "digits": [" ".join(str(number * number) for number in range(400))],
}


@pytest.fixture
def write_parquet(tmp_path: Path) -> WriteParquet:
    def write(
        name: str, texts: list[str | None], *, rows_per_group: int = 1024, kind: pa.DataType = None
    ) -> Path:
        path = tmp_path / name
        table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})
        pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")
        return path

    return write


def _tokens(tokenizer: rustbpe.Tokenizer) -> list[bytes]:
    ranks = tokenizer.get_mergeable_ranks()
    assert [token_id for _, token_id in ranks] == list(range(len(ranks)))
    return [token for token, _ in ranks]


def _learn(texts: list[str], vocab_size: int, pattern: str = PATTERN) -> list[bytes]:
    tokenizer = rustbpe.Tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tokenizer.train_from_iterator(texts, vocab_size, pattern)
    return _tokens(tokenizer)


# --------------------------------------------------------------------------------------------------
# The same merges as the reference rule


@pytest.mark.parametrize("name", CORPORA)
def test_the_merges_in_order_are_those_of_the_reference_rule(name: str) -> None:
    assert _learn(CORPORA[name], 256 + 300) == learn_slowly(CORPORA[name], 300, PATTERN)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="ab c", max_size=40), min_size=1, max_size=6).filter(lambda texts: any(texts))
)
def test_any_small_text_learns_what_the_reference_rule_learns(texts: list[str]) -> None:
    assert _learn(texts, 256 + 30) == learn_slowly(texts, 30, PATTERN)


@pytest.mark.parametrize(
    "pattern", [rustbpe.GPT4_PATTERN, gpt4_pattern(r"\p{N}"), r"\w+|\W+", r"[^\n]+(?=\n)"]
)
def test_other_patterns_are_followed(pattern: str) -> None:
    assert _learn(CORPORA["everything"], 256 + 100, pattern) == learn_slowly(
        CORPORA["everything"], 100, pattern
    )


def test_the_default_pattern_is_gpt4s_own() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.get_pattern() == rustbpe.GPT4_PATTERN == gpt4_pattern(r"\p{N}{1,3}")
    tokenizer.train_from_iterator(["some text"], 258)
    assert tokenizer.get_pattern() == rustbpe.GPT4_PATTERN


# --------------------------------------------------------------------------------------------------
# One text, many ways to it


@pytest.fixture(scope="module")
def documents() -> list[str]:
    generator = random.Random(3)
    sentences = [part for texts in CORPORA.values() for text in texts for part in text.split(".") if part]
    return [".".join(generator.choices(sentences, k=generator.randrange(8))) for _ in range(3000)]


def test_iterator_files_and_counts_in_any_order_learn_the_same(
    documents: list[str], write_parquet: WriteParquet, tmp_path: Path
) -> None:
    expected = _learn(documents, 1000)
    shards = [write_parquet(f"{i}.parquet", documents[i::3], rows_per_group=100 + 200 * i) for i in range(3)]

    from_files = rustbpe.Tokenizer()
    from_files.train_from_parquet_files(shards, 1000, PATTERN)
    assert _tokens(from_files) == expected

    counts = [tmp_path / f"{i}.counts" for i in range(3)]
    for shard, destination in zip(shards, counts, strict=True):
        rustbpe.count_words(shard, destination, PATTERN)
    for order in (counts, counts[::-1], [counts[1], counts[2], counts[0]]):
        from_counts = rustbpe.Tokenizer()
        from_counts.train_from_counts(order, 1000)
        assert _tokens(from_counts) == expected
        assert from_counts.get_pattern() == PATTERN

    in_small_buffers = rustbpe.Tokenizer()
    in_small_buffers.train_from_iterator(iter(documents), 1000, PATTERN, buffer_size=7)
    assert _tokens(in_small_buffers) == expected


def test_one_more_shard_costs_one_more_count_and_equals_training_on_all(
    documents: list[str], write_parquet: WriteParquet, tmp_path: Path
) -> None:
    shards = [write_parquet(f"{i}.parquet", documents[i::7], rows_per_group=50) for i in range(7)]
    counts = [tmp_path / f"{i}.counts" for i in range(7)]
    for i in range(6):
        rustbpe.count_words(shards[i], counts[i], PATTERN)
    for known in (6, 7):
        if known == 7:
            rustbpe.count_words(shards[6], counts[6], PATTERN)
        at_once, from_counts = rustbpe.Tokenizer(), rustbpe.Tokenizer()
        at_once.train_from_parquet_files(shards[:known], 1500, PATTERN)
        from_counts.train_from_counts(counts[:known], 1500)
        assert _tokens(from_counts) == _tokens(at_once)


def test_rare_words_can_be_left_out_and_are_rare_over_all_files(
    write_parquet: WriteParquet, tmp_path: Path
) -> None:
    counts = []
    for i, text in enumerate(["abab abab abab xyxyxy", "abab xyxyxy xyxyxy", "lonely"]):
        counts.append(tmp_path / f"{i}.counts")
        rustbpe.count_words(write_parquet(f"{i}.parquet", [text]), counts[-1], r"\S+")

    def train(min_count: int | None) -> list[bytes]:
        tokenizer = rustbpe.Tokenizer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tokenizer.train_from_counts(counts, 280, min_count=min_count)
        return _tokens(tokenizer)[256:]

    assert train(None) == train(1)
    assert b"lonely" in train(1)
    assert train(2) == train(3) == [b"xy", b"ab", b"xyxy", b"abab", b"xyxyxy"]
    assert train(4) == [b"ab", b"abab"]
    with pytest.raises(ValueError, match="no text to train on"):
        train(5)
    with pytest.raises(ValueError, match="min_count must be at least 1"):
        train(0)


def test_the_cap_on_all_characters_ends_the_reading_of_a_file(
    documents: list[str], write_parquet: WriteParquet, tmp_path: Path
) -> None:
    path = write_parquet("capped.parquet", documents, rows_per_group=10)
    threads = threading.active_count()
    totals = rustbpe.count_words(path, tmp_path / "capped.counts", PATTERN, max_chars=1000)
    assert totals["characters"] == 1000
    assert threading.active_count() == threads


def test_counts_with_caps_add_up_to_training_on_the_capped_text(
    documents: list[str], write_parquet: WriteParquet, tmp_path: Path
) -> None:
    cap, budget = 300, 40_000
    capped: list[str] = []
    counts = []
    for i in range(3):
        shard = write_parquet(f"{i}.parquet", documents[i * 1000 : (i + 1) * 1000])
        destination = tmp_path / f"{i}.counts"
        totals = rustbpe.count_words(shard, destination, PATTERN, doc_cap=cap, max_chars=budget)
        counts.append(destination)
        room = budget
        rows = 0
        for document in documents[i * 1000 : (i + 1) * 1000]:
            if room:
                capped.append(document[: min(cap, room)])
                room -= len(capped[-1])
                rows += 1
        assert room == 0, "the budget must bind for this test to say something"
        assert (totals["characters"], totals["rows"]) == (budget, rows)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_counts(counts, 800)
    assert _tokens(tokenizer) == _learn(capped, 800)


def test_the_cap_on_all_characters_runs_over_the_files_in_order(
    documents: list[str], write_parquet: WriteParquet
) -> None:
    shards = [write_parquet(f"{i}.parquet", documents[i * 100 : (i + 1) * 100]) for i in range(3)]
    room = sum(len(document[:200]) for document in documents[:150])
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_parquet_files(
        shards, 600, pattern=PATTERN, text_column="text", doc_cap=200, max_chars=room
    )
    assert _tokens(tokenizer) == _learn([document[:200] for document in documents[:150]], 600)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_every_arrow_kind_and_nulls_are_read(
    kind: pa.DataType, write_parquet: WriteParquet, tmp_path: Path
) -> None:
    texts: list[str | None] = ["the cat", None, "", "the hat", "the cat", "한국어"]
    path = write_parquet("kinds.parquet", texts, rows_per_group=4, kind=kind)
    totals = rustbpe.count_words(path, tmp_path / "kinds.counts", PATTERN)
    words = 3 * 2 + 1
    assert totals["rows"] == 6
    assert totals["words"] == words
    assert totals["unique_words"] == 4
    assert totals["characters"] == 24
    assert totals["bytes"] == 30
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_parquet_files([path], 260, PATTERN)
    assert _tokens(tokenizer) == _learn([text for text in texts if text], 260)


# --------------------------------------------------------------------------------------------------
# Encoding


@pytest.fixture(scope="module")
def trained() -> tuple[rustbpe.Tokenizer, tiktoken.Encoding]:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(CORPORA["everything"] + CORPORA["repetitive"], 900, PATTERN)
    reference = tiktoken.Encoding(
        "reference",
        pat_str=PATTERN,
        mergeable_ranks=dict(tokenizer.get_mergeable_ranks()),
        special_tokens={},
    )
    return tokenizer, reference


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=80),
        st.text(alphabet="aeinrst ,.\n한국어éſ'0129😀", max_size=120),
        st.sampled_from([text.text for text in evaluation_texts().values()]),
    )
)
def test_ids_are_those_of_tiktoken(trained: tuple[rustbpe.Tokenizer, tiktoken.Encoding], text: str) -> None:
    tokenizer, reference = trained
    assert tokenizer.encode(text) == reference.encode_ordinary(text)


def test_an_untrained_tokenizer_encodes_to_bytes() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]


@pytest.mark.needs_data
def test_real_shards_learn_the_same_from_counts_as_at_once(shared_data: Path, tmp_path: Path) -> None:
    shards = sorted((shared_data / "pretrain_text").glob("shard_0000[01].parquet"))
    at_once, from_counts = rustbpe.Tokenizer(), rustbpe.Tokenizer()
    at_once.train_from_parquet_files(shards, 4096, PATTERN, doc_cap=10_000)
    counts = [tmp_path / f"{shard.stem}.counts" for shard in shards]
    for shard, destination in zip(shards, counts, strict=True):
        rustbpe.count_words(shard, destination, PATTERN, doc_cap=10_000)
    from_counts.train_from_counts(counts, 4096)
    assert at_once.vocab_size == 4096
    assert _tokens(at_once) == _tokens(from_counts)
