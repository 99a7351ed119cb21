"""Rows of text for pretraining: documents in a flat stream, cut into rows that begin with <|bos|>.

A document is <|bos|> and its tokens. The stream of all documents is cut into rows of T + 1 tokens.
Where a cut falls inside a document, the next row begins with another <|bos|> and goes on with the
rest, so every row begins as the model will begin to read, and no token is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanochat.training.bad_input import BadInput

# Opens a shard at a document: yields (index, text) from `start` on, leaving out what has no text.
OpenShard = Callable[[Path, int], Iterable[tuple[int, str | None]]]
EncodeBatch = Callable[[list[str]], Sequence[Sequence[int]]]
Row = npt.NDArray[np.uint32]

# Documents tokenized at once: enough to keep the encoder's threads busy, few enough to forget.
ENCODE_AT_ONCE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPosition:
    """The next token to serve: of which pass over the shards, shard, document of it, token of that.

    Token 0 of a document is its <|bos|>.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    token: int = 0


class DocumentStream:
    """The tokens of every document of the shards in order, pass after pass, from a position on."""

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        open_shard: OpenShard,
        encode: EncodeBatch,
        bos: int,
        passes: int | None = None,
    ) -> None:
        """passes: end after so many passes over the shards (None: never)."""
        self._shards = list(shards)
        self._open, self._encode, self._bos, self._passes = open_shard, encode, bos, passes

    @property
    def shard_count(self) -> int:
        return len(self._shards)

    def documents(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, list[int]]]:
        """(position of its first token, tokens) of every document from that of `start` on.

        Raises BadInput naming the shards when a whole pass has no text.
        """
        epoch, first_shard, first_document = start.epoch, start.shard, start.document
        while self._passes is None or epoch < self._passes:
            found = first_shard > 0 or first_document > 0  # a pass that is joined late says nothing
            for shard in range(first_shard, len(self._shards)):
                for index, tokens in self._encoded(self._shards[shard], first_document):
                    found = True
                    position = StreamPosition(epoch=epoch, shard=shard, document=index)
                    yield position, tokens
                first_document = 0
            if not found:
                names = ", ".join(path.name for path in self._shards[:5])
                raise BadInput(f"no document with text in {len(self._shards)} shard(s): {names}")
            first_shard = 0
            epoch += 1

    def _encoded(self, path: Path, start: int) -> Iterator[tuple[int, list[int]]]:
        indices: list[int] = []
        texts: list[str] = []
        for index, text in self._open(path, start):
            if text:
                indices.append(index)
                texts.append(text)
            if len(texts) == ENCODE_AT_ONCE:
                yield from self._batch(indices, texts)
                indices, texts = [], []
        if texts:
            yield from self._batch(indices, texts)

    def _batch(self, indices: list[int], texts: list[str]) -> Iterator[tuple[int, list[int]]]:
        for index, ids in zip(indices, self._encode(texts), strict=True):
            yield index, [self._bos, *ids]

    def rows(self, start: StreamPosition, row_tokens: int) -> Iterator[tuple[Row, StreamPosition]]:
        """(row of `row_tokens` ids, position of the first token after it) from `start` on.

        What is left at the end of the last pass and fills no row is not served.
        """
        assert row_tokens >= 2, "a row needs an input and a target"
        row = np.empty(row_tokens, dtype=np.uint32)
        filled = 0
        for position, tokens in self.documents(start):
            at = start.token if position == replace(start, token=0) else 0
            while at < len(tokens):
                if filled == 0 and at > 0:
                    row[0] = self._bos
                    filled = 1
                taken = min(row_tokens - filled, len(tokens) - at)
                row[filled : filled + taken] = tokens[at : at + taken]
                filled += taken
                at += taken
                if filled == row_tokens:
                    yield row.copy(), replace(position, token=at)
                    filled = 0
