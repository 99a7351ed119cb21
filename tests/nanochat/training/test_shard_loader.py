"""The stream of text: every token once, every row from <|bos|>, the same order whatever the world."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.training.batches import Batch
from nanochat.training.packing import DocumentStream, StreamPosition
from nanochat.training.shard_loader import ShardLoader, evaluation_rows

BOS = 1000
SHARDS = [Path("a"), Path("b"), Path("c")]


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def open_from(contents: dict[Path, list[str | None]]) -> Any:
    def open_shard(path: Path, start: int) -> Iterator[tuple[int, str | None]]:
        for index, text in enumerate(contents[path]):
            if index >= start:
                yield index, text

    return open_shard


def random_contents(seed: int, most: int = 40) -> dict[Path, list[str | None]]:
    numbers = random.Random(seed)
    return {
        path: [
            numbers.choice([None, ""])
            if numbers.random() < 0.1
            else "".join(chr(97 + numbers.randrange(26)) for _ in range(numbers.randrange(1, most)))
            for _ in range(numbers.randrange(1, 30))
        ]
        for path in SHARDS
    }


def stream_of(contents: dict[Path, list[str | None]], passes: int | None = None) -> DocumentStream:
    return DocumentStream(SHARDS, open_shard=open_from(contents), encode=encode, bos=BOS, passes=passes)


def flat(contents: dict[Path, list[str | None]], passes: int = 1) -> list[int]:
    once = [
        token
        for path in SHARDS
        for text in contents[path]
        if text
        for token in [BOS, *(ord(letter) for letter in text)]
    ]
    return once * passes


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), row_tokens=st.integers(2, 50))
def test_every_token_is_served_once_and_every_row_begins_with_bos(seed: int, row_tokens: int) -> None:
    contents = random_contents(seed)
    expected = flat(contents, passes=2)
    served: list[int] = []
    for row, _ in stream_of(contents, passes=2).rows(StreamPosition(), row_tokens):
        tokens = row.tolist()
        assert tokens[0] == BOS
        at = len(served)
        # A row that begins inside a document has a <|bos|> more than the stream.
        served += tokens if expected[at] == BOS else tokens[1:]
        assert served == expected[: len(served)]
    assert len(expected) - len(served) < row_tokens


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), row_tokens=st.integers(2, 40), cut=st.integers(0, 60))
def test_a_stream_goes_on_from_any_position(seed: int, row_tokens: int, cut: int) -> None:
    contents = random_contents(seed)
    rows = list(stream_of(contents, passes=2).rows(StreamPosition(), row_tokens))
    if not rows:
        return
    position = rows[cut % len(rows)][1]
    rest = [row.tolist() for row, _ in stream_of(contents, passes=2).rows(position, row_tokens)]
    assert rest == [row.tolist() for row, _ in rows[cut % len(rows) + 1 :]]


def collect(loader: ShardLoader, count: int) -> list[Batch]:
    return [loader.next_batch() for _ in range(count)]


def batches(
    contents: dict[Path, list[str | None]],
    count: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    global_rows: int = 6,
    state: dict[str, Any] | None = None,
) -> list[tuple[list[list[int]], dict[str, Any]]]:
    loader = ShardLoader(
        stream_of(contents),
        context=7,
        global_rows=global_rows,
        device_batch_rows=2,
        rank=rank,
        world_size=world_size,
        state=state,
    )
    try:
        found = []
        for _ in range(count):
            batch = loader.next_batch()
            assert all(len(part.ids_BT) <= 2 for part in batch.parts)
            rows = [
                [*ids, int(targets[-1])]
                for part in batch.parts
                for ids, targets in zip(part.ids_BT.tolist(), part.targets_BT, strict=True)
            ]
            found.append((rows, batch.state))
        return found
    finally:
        loader.close()


@pytest.mark.parametrize("world_size", [2, 3, 4, 9])
def test_ranks_share_each_global_batch_whatever_their_number(world_size: int) -> None:
    """Also with more ranks than rows (9 ranks, 6 rows): some get none, and nobody waits."""
    contents = random_contents(3)
    alone = batches(contents, 5)
    ranks = [batches(contents, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, (rows, state) in enumerate(alone):
        shared = [None] * len(rows)
        for rank in range(world_size):
            shared[rank::world_size] = ranks[rank][step][0]
            assert ranks[rank][step][1] == state
        assert shared == rows


def test_a_run_saved_on_two_ranks_resumes_on_one_in_the_same_order() -> None:
    contents = random_contents(4)
    whole = batches(contents, 9)
    first = batches(contents, 4, rank=1, world_size=2)
    rest = batches(contents, 5, state=first[-1][1])
    assert [rows for rows, _ in rest] == [rows for rows, _ in whole[4:]]
    assert rest[-1][1] == whole[-1][1]


def test_the_shards_are_passed_over_again_and_the_state_counts_the_passes() -> None:
    contents: dict[Path, list[str | None]] = {path: ["abcdefg"] for path in SHARDS}
    served = batches(contents, 4, global_rows=2)
    assert served[0][0][0] == [BOS, *(ord(letter) for letter in "abcdefg")]
    assert [state["epoch"] for _, state in served] == [0, 1, 1, 2]


def test_a_shard_without_text_among_others_is_nothing_and_all_without_is_an_error() -> None:
    contents: dict[Path, list[str | None]] = {
        SHARDS[0]: [None, ""],
        SHARDS[1]: ["abcdefgh" * 9],
        SHARDS[2]: [],
    }
    assert batches(contents, 3)
    nothing: dict[Path, list[str | None]] = {path: [None, ""] for path in SHARDS}
    with pytest.raises(ValueError, match=r"no document with text in 3 shard\(s\): a, b, c"):
        batches(nothing, 1)


def test_what_reading_raises_reaches_the_caller_and_stays_raised() -> None:
    def broken(path: Path, start: int) -> Iterator[tuple[int, str]]:
        yield 0, "abcdefghijklmnopqrstuvwxyz"
        raise OSError("shard c is gone")

    loader = ShardLoader(
        DocumentStream([Path("c")], open_shard=broken, encode=encode, bos=BOS),
        context=7,
        global_rows=1,
        device_batch_rows=1,
    )
    with pytest.raises(OSError, match="shard c is gone"):
        collect(loader, 20)
    with pytest.raises(OSError, match="shard c is gone"):
        loader.next_batch()
    loader.close()


def test_closing_ends_the_thread_even_when_nobody_takes_batches() -> None:
    before = threading.active_count()
    loader = ShardLoader(stream_of(random_contents(1)), context=7, global_rows=2, device_batch_rows=2)
    loader.next_batch()
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_a_document_longer_than_many_rows_is_served_whole() -> None:
    contents: dict[Path, list[str | None]] = {path: ["x" * 100] for path in SHARDS}
    rows = [row.tolist() for row, _ in stream_of(contents, passes=1).rows(StreamPosition(), 8)]
    assert sum(row.count(ord("x")) for row in rows) > 290
    assert all(row[0] == BOS for row in rows)


def test_evaluation_rows_are_the_first_of_one_pass() -> None:
    contents = random_contents(5)
    stream = stream_of(contents, passes=1)
    everything = [row.tolist() for row, _ in stream.rows(StreamPosition(), 8)]
    assert [row.tolist() for row in evaluation_rows(stream, 7, tokens=21)] == everything[:3]
    assert len(evaluation_rows(stream, 7, tokens=10**6)) == len(everything)
    empty: dict[Path, list[str | None]] = {path: ["ab"] for path in SHARDS}
    with pytest.raises(ValueError, match="does not fill one row of 50 tokens"):
        evaluation_rows(stream_of(empty, passes=1), 50, tokens=100)
