"""The loader of pretraining: rows of text from the shards, made ahead on a thread of its own.

Rows are numbered through the whole run and a step takes the next `global_rows` of them; a rank
keeps every world-size'th of those. Each rank reads all text, so the order is the same on any number
of ranks, nobody waits for anybody, and the state is one position in the stream. (What it costs:
every rank tokenizes everything. The encoder does some 5 MB/s on a thread beside the training.)
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from nanochat.training.bad_input import BadInput
from nanochat.training.batches import Batch, MicroBatch, micro_batch, slices
from nanochat.training.packing import DocumentStream, Row, StreamPosition

_AHEAD = 4  # global batches


class ShardLoader:
    """Batches of `global_rows` rows of `context` + 1 tokens. `state`: that of the last batch that counted."""

    def __init__(
        self,
        stream: DocumentStream,
        *,
        context: int,
        global_rows: int,
        device_batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._stream = stream
        self._row_tokens = context + 1
        self._global_rows, self._device_rows = global_rows, device_batch_rows
        self._rank, self._world_size = rank, world_size
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._closing = threading.Event()
        start = StreamPosition(**(state or {}))
        self._thread = threading.Thread(target=self._work, args=(start,), name="shard-loader", daemon=True)
        self._thread.start()

    def next_batch(self) -> Batch:
        """The next global batch's rows of this rank. Raises what reading or tokenizing raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)
            raise item
        return item

    def epochs(self, state: dict[str, Any]) -> float:
        """Passes over the shards that a state stands for, counted in shards begun."""
        return float(state["epoch"] + state["shard"] / self._stream.shard_count)

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _work(self, start: StreamPosition) -> None:
        try:
            for batch in self._batches(start):
                self._hand_over(batch)
                if self._closing.is_set():
                    return
        except BaseException as error:  # handed to the caller of next_batch, who raises it
            self._hand_over(error)

    def _hand_over(self, item: Batch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return

    def _batches(self, start: StreamPosition) -> Iterator[Batch]:
        mine: list[Row] = []
        for number, (row, after) in enumerate(self._stream.rows(start, self._row_tokens)):
            place = number % self._global_rows
            if place % self._world_size == self._rank:
                mine.append(row)
            if place == self._global_rows - 1:
                yield self._collate(mine, after)
                mine = []
        raise AssertionError("a stream for training passes over its shards for ever")

    def _collate(self, rows: list[Row], after: StreamPosition) -> Batch:
        parts = tuple(micro_batch(np.stack(rows[piece])) for piece in slices(len(rows), self._device_rows))
        tokens = len(rows) * (self._row_tokens - 1)
        return Batch(parts=parts, tokens=tokens, state=dataclasses.asdict(after))


def evaluation_rows(stream: DocumentStream, context: int, tokens: int) -> list[Row]:
    """The first `tokens` // `context` rows of a stream of one pass (at least one; fewer if it is shorter).

    Raises BadInput when the text does not fill one row.
    """
    stream_rows = stream.rows(StreamPosition(), context + 1)
    rows = [row for row, _ in islice(stream_rows, max(1, tokens // context))]
    if not rows:
        raise BadInput(f"the validation text does not fill one row of {context} tokens; use more text")
    return rows


def evaluation_batches(
    rows: list[Row], device_batch_rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """One rank's share of the rows."""
    mine = rows[rank::world_size]
    for piece in slices(len(mine), device_batch_rows):
        yield micro_batch(np.stack(mine[piece]))
