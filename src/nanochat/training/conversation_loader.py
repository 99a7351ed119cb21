"""The loader of midtraining and fine-tuning: conversations, rendered once, in rows by a plan.

A plan says which conversations make up each row of an epoch; it follows from the seed and the epoch
alone, so the state is (epoch, row). Midtraining packs whole conversations into rows of one length;
fine-tuning gives each conversation a row, padded to the longest beside it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanochat.data.conversations import Conversation
from nanochat.tokenizer import Tokenizer
from nanochat.training.bad_input import BadInput
from nanochat.training.batches import Batch, MicroBatch, micro_batch, slices

Plan = Sequence[Sequence[int]]

# Conversations that packing chooses from: the larger, the fuller the rows and the less random.
LOOK_AHEAD = 512
# Rows are padded to multiples of this: few different shapes, which kernels are prepared for once.
PAD_TO = 16


@dataclass(frozen=True, kw_only=True)
class RenderedConversations:
    """Token ids and loss masks of conversations, one after the other.

    ids, mask: of all tokens; conversation i is [starts[i], starts[i + 1]). clipped: how many were
    longer than allowed.
    """

    ids: npt.NDArray[np.unsignedinteger[Any]]
    mask: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    clipped: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)


def render_all(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, max_tokens: int, name: str = "the mixture"
) -> RenderedConversations:
    """Render every conversation, at most `max_tokens` of each. `name` is what an error calls them.

    Raises BadInput when there is no conversation.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids: list[npt.NDArray[Any]] = []
    masks: list[npt.NDArray[np.bool_]] = []
    clipped = 0
    for conversation in conversations:
        rendered = tokenizer.render(conversation, max_tokens)
        clipped += rendered.clipped
        ids.append(np.array(rendered.ids, dtype=dtype))
        masks.append(np.array(rendered.mask, dtype=np.bool_))
    if not ids:
        raise BadInput(f"{name} holds no conversation")
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in ids], out=starts[1:])
    return RenderedConversations(
        ids=np.concatenate(ids), mask=np.concatenate(masks), starts=starts, clipped=clipped
    )


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return order


def pack_best_fit(
    lengths: Sequence[int], order: Sequence[int], row_tokens: int, look_ahead: int = LOOK_AHEAD
) -> list[list[int]]:
    """Rows of whole conversations, `row_tokens` at most in each; every conversation in one row.

    A row begins with the one that has waited longest and then takes, of the next `look_ahead` in
    order, the longest that still fits. Raises ValueError for a conversation longer than a row.
    """
    rows: list[list[int]] = []
    window: list[tuple[int, int]] = []  # (length, place in the order), sorted
    placed = [False] * len(order)
    oldest = ahead = 0
    while oldest < len(order):
        if lengths[order[oldest]] > row_tokens:
            raise ValueError(
                f"a conversation of {lengths[order[oldest]]} tokens does not fit a row of {row_tokens}"
            )
        row: list[int] = []
        left = row_tokens
        while True:
            while ahead < len(order) and len(window) < look_ahead:
                bisect.insort(window, (lengths[order[ahead]], ahead))
                ahead += 1
            if not row:
                chosen = bisect.bisect_left(window, (lengths[order[oldest]], oldest))
            else:
                chosen = bisect.bisect_left(window, (left + 1, -1)) - 1
            if chosen < 0:
                break
            length, place = window.pop(chosen)
            placed[place] = True
            row.append(order[place])
            left -= length
        rows.append(row)
        while oldest < len(order) and placed[oldest]:
            oldest += 1
    return rows


class ConversationLoader:
    """Batches of `global_rows` rows.

    packed: rows of `context` + 1 tokens, all of them in the loss (midtraining); else one conversation
    a row, padded to the longest beside it, loss where the mask says (fine-tuning).
    state: that of the last batch that counted.
    """

    def __init__(
        self,
        conversations: RenderedConversations,
        *,
        context: int,
        packed: bool,
        pad: int,
        seed: int,
        global_rows: int,
        device_batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._conversations = conversations
        self._lengths: list[int] = conversations.lengths.tolist()
        self._context, self._packed, self._pad, self._seed = context, packed, pad, seed
        self._global_rows, self._device_rows = global_rows, device_batch_rows
        self._rank, self._world_size = rank, world_size
        start = state or {"epoch": 0, "row": 0}
        self._epoch, self._row = int(start["epoch"]), int(start["row"])
        self._planned_epoch: int | None = None
        self._plan: Plan = ()
        self._plan_epoch()

    def plan(self, epoch: int) -> Plan:
        """The rows of an epoch, as indices of conversations."""
        order = shuffled(len(self._lengths), self._seed, epoch)
        if epoch == self._planned_epoch:
            return self._plan
        if self._packed:
            return pack_best_fit(self._lengths, order, self._context + 1)
        return [[index] for index in order]

    def next_batch(self) -> Batch:
        rows = [self._next_row() for _ in range(self._global_rows)]
        state = {"epoch": self._epoch, "row": self._row}
        if not self._packed:
            # Neighbours of like length waste less padding; the loss is the batch's, whatever the order.
            rows.sort(key=lambda row: self._lengths[row[0]])
        mine = rows[self._rank :: self._world_size]
        parts = tuple(self._collate(mine[piece]) for piece in self._pieces(mine))
        tokens = sum(self._lengths[index] for row in mine for index in row) - len(mine)
        return Batch(parts=parts, tokens=tokens, state=state)

    def epochs(self, state: dict[str, Any]) -> float:
        """Passes over the conversations that a state stands for."""
        return float(state["epoch"] + state["row"] / len(self.plan(state["epoch"])))

    def close(self) -> None:
        """Nothing to end."""

    def _plan_epoch(self) -> None:
        self._plan = self.plan(self._epoch)
        self._planned_epoch = self._epoch

    def _next_row(self) -> Sequence[int]:
        if self._row == len(self._plan):
            self._epoch, self._row = self._epoch + 1, 0
            self._plan_epoch()
        self._row += 1
        return self._plan[self._row - 1]

    def _pieces(self, rows: Sequence[Sequence[int]]) -> Iterator[slice]:
        """What goes through the model at once: rows that, padded, are at most a full device batch."""
        if self._packed:
            return slices(len(rows), self._device_rows)
        widths = [_padded(self._lengths[row[0]], self._context) for row in rows]
        return slices_of_widths(widths, self._device_rows * self._context)

    def _collate(self, rows: Sequence[Sequence[int]]) -> MicroBatch:
        return collate(
            self._conversations,
            rows,
            width=self._context + 1 if self._packed else None,
            context=self._context,
            answers_only=not self._packed,
            pad=self._pad,
        )


def _padded(tokens: int, context: int) -> int:
    """Inputs of a row whose longest conversation has `tokens` tokens (one less are inputs)."""
    return min(context, PAD_TO * math.ceil((tokens - 1) / PAD_TO))


def slices_of_widths(widths: Sequence[int], budget: int) -> Iterator[slice]:
    """Rows of ascending widths in pieces whose rows times widest are at most `budget` (one row always).

    The cuts are those of least cost: what a piece computes, padding included, and a tenth of a full
    piece for every piece there is, since each passes through the whole model.
    """
    least: list[tuple[float, int]] = [
        (0.0, 0)
    ]  # of the first n rows: the cost, and where the last piece starts
    for end in range(1, len(widths) + 1):
        widest = widths[end - 1]
        starts = (s for s in range(end) if (end - s) * widest <= budget or s == end - 1)
        least.append(min((least[s][0] + (end - s) * widest + budget / 10, s) for s in starts))
    ends = []
    end = len(widths)
    while end:
        ends.append(end)
        end = least[end][1]
    start = 0
    for end in reversed(ends):
        yield slice(start, end)
        start = end


def collate(
    conversations: RenderedConversations,
    rows: Sequence[Sequence[int]],
    *,
    width: int | None,
    context: int,
    answers_only: bool,
    pad: int,
) -> MicroBatch:
    """Rows of conversations as tensors, what they leave filled with `pad` and not in the loss.

    width: tokens of a row (None: those of the longest row, rounded up so that the inputs are a
    multiple of `PAD_TO`, or the context). answers_only: loss where the mask says, else everywhere.
    """
    starts = conversations.starts
    if width is None:
        longest = max(sum(int(starts[index + 1] - starts[index]) for index in row) for row in rows)
        width = _padded(longest, context) + 1
    ids_BR = np.full((len(rows), width), pad, dtype=conversations.ids.dtype)
    weights_BR = np.zeros((len(rows), width), dtype=np.bool_)
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            span = slice(starts[index], starts[index + 1])
            end = at + int(starts[index + 1] - starts[index])
            ids_BR[number, at:end] = conversations.ids[span]
            weights_BR[number, at:end] = conversations.mask[span] if answers_only else True
            at = end
    return micro_batch(ids_BR, weights_BR)


def conversation_batches(
    conversations: RenderedConversations,
    *,
    context: int,
    answers_only: bool,
    device_batch_rows: int,
    pad: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """One rank's share of all conversations, one a row: for evaluation."""
    by_length = np.argsort(conversations.lengths, kind="stable").tolist()
    mine = by_length[rank::world_size]
    widths = [_padded(int(conversations.lengths[index]), context) for index in mine]
    for piece in slices_of_widths(widths, device_batch_rows * context):
        rows = [[index] for index in mine[piece]]
        yield collate(conversations, rows, width=None, context=context, answers_only=answers_only, pad=pad)
