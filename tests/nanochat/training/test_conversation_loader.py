"""Conversations in rows: whole, each once an epoch, masked as rendered, the same order everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.conversations import Part, exchange
from nanochat.tokenizer import Tokenizer
from nanochat.training.bad_input import BadInput
from nanochat.training.conversation_loader import (
    ConversationLoader,
    RenderedConversations,
    conversation_batches,
    pack_best_fit,
    render_all,
    shuffled,
    slices_of_widths,
)

PAD = 0


def made_up(lengths: list[int], answers: list[int] | None = None) -> RenderedConversations:
    """Conversation i is the number i + 1 over and over; its last `answers[i]` tokens are the answer."""
    ids = np.concatenate([np.full(length, index + 1, np.uint16) for index, length in enumerate(lengths)])
    masks = [
        np.arange(length) >= length - (answers[index] if answers else length - 1)
        for index, length in enumerate(lengths)
    ]
    return RenderedConversations(
        ids=ids, mask=np.concatenate(masks), starts=np.concatenate([[0], np.cumsum(lengths)]), clipped=0
    )


def load(
    conversations: RenderedConversations, *, packed: bool, context: int = 32, **changes: Any
) -> ConversationLoader:
    settings = {"pad": PAD, "seed": 5, "global_rows": 4, "device_batch_rows": 3, **changes}
    return ConversationLoader(conversations, context=context, packed=packed, **settings)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 33), min_size=1, max_size=120),
    seed=st.integers(0, 99),
    look_ahead=st.integers(1, 40),
)
def test_packing_places_every_conversation_once_and_no_row_overflows(
    lengths: list[int], seed: int, look_ahead: int
) -> None:
    rows = pack_best_fit(lengths, shuffled(len(lengths), seed, 0), 33, look_ahead)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 33 for row in rows)


def test_packing_takes_the_longest_that_fits_and_never_leaves_the_oldest_behind() -> None:
    lengths = [10, 4, 7, 6, 10, 3]
    assert pack_best_fit(lengths, range(6), 17) == [[0, 2], [1, 4, 5], [3]]
    # With a look-ahead of one nothing can be chosen: the order is kept.
    assert pack_best_fit(lengths, range(6), 17, look_ahead=1) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="18 tokens does not fit a row of 17"):
        pack_best_fit([18], [0], 17)


def test_packed_rows_are_nearly_full() -> None:
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(10, 120, size=3000).tolist()
    rows = pack_best_fit(lengths, shuffled(3000, 0, 0), 257)
    assert sum(lengths) / (257 * len(rows)) > 0.98


def test_packed_batches_have_one_shape_and_all_tokens_but_padding_in_the_loss() -> None:
    loader = load(made_up([9, 20, 13, 33, 5, 7, 30, 11]), packed=True)
    for _ in range(6):
        batch = loader.next_batch()
        for part in batch.parts:
            assert part.ids_BT.shape[1] == 32
            assert torch.equal(part.weights_BT > 0, part.targets_BT != PAD)
            assert torch.equal(part.ids_BT[:, 1:], part.targets_BT[:, :-1])


def test_the_loss_of_fine_tuning_is_where_the_mask_says() -> None:
    loader = load(made_up([20, 12, 30, 8], answers=[5, 3, 10, 2]), packed=False)
    seen = {}
    for part in loader.next_batch().parts:
        for ids, targets, weights in zip(part.ids_BT, part.targets_BT, part.weights_BT, strict=True):
            conversation = int(ids[0])
            seen[conversation] = int(weights.sum())
            # The answer is the end of the conversation: its last target is the last that is not padding.
            end = int((targets != PAD).sum())
            assert weights.nonzero().flatten().tolist() == list(range(end - seen[conversation], end))
    assert seen == {1: 5, 2: 3, 3: 10, 4: 2}


def test_rows_of_fine_tuning_are_padded_to_multiples_of_16_or_the_context() -> None:
    shapes = {
        part.ids_BT.shape[1]
        for length in (2, 16, 17, 18, 25)
        for part in load(made_up([length] * 4), packed=False, context=24).next_batch().parts
    }
    assert shapes == {16, 24}


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_serves_every_conversation_once_and_the_next_in_another_order(packed: bool) -> None:
    count = 40
    lengths = np.random.default_rng(1).integers(5, 30, size=count).tolist()
    loader = load(made_up(lengths), packed=packed, global_rows=1)
    orders = []
    for epoch in range(2):
        served: list[int] = []
        for _ in loader.plan(epoch):
            (part,) = loader.next_batch().parts
            served += [int(token) for token in part.ids_BT.unique() if token != PAD]
        orders.append(served)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, count + 1))
    assert orders[0] != orders[1]


def rows_of(loader: ConversationLoader, steps: int) -> list[list[tuple[int, ...]]]:
    served = []
    for _ in range(steps):
        batch = loader.next_batch()
        rows = [
            tuple(token for token in row if token != PAD)
            for part in batch.parts
            for row in part.ids_BT.tolist()
        ]
        served.append(sorted(rows))
    return served


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_ranks_share_each_global_batch_and_any_world_resumes_any_other(packed: bool, world_size: int) -> None:
    lengths = np.random.default_rng(2).integers(5, 30, size=30).tolist()
    conversations = made_up(lengths)
    alone = rows_of(load(conversations, packed=packed), 12)
    ranks = [
        load(conversations, packed=packed, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step in range(5):
        shared = [row for rank in ranks for (rows,) in [rows_of(rank, 1)] for row in rows]
        assert sorted(shared) == alone[step]
    state = ranks[0].next_batch().state
    resumed = load(conversations, packed=packed, state=state)
    assert rows_of(resumed, 6) == alone[6:]


def test_conversations_are_clipped_and_counted(byte_tokenizer: Tokenizer) -> None:
    short = exchange("Hi", "Hello")
    calls = exchange("2+2?", (Part("python", "2+2"), Part("python_output", "4"), Part("text", "4")))
    rendered = render_all([short, calls, exchange("Hi", "x" * 500)], byte_tokenizer, 40)
    assert rendered.clipped == 1
    assert rendered.lengths.max() == 40
    assert rendered.ids[rendered.starts[0]] == byte_tokenizer.bos
    whole = byte_tokenizer.render(calls)
    span = slice(rendered.starts[1], rendered.starts[2])
    assert rendered.ids[span].tolist() == list(whole.ids)
    assert rendered.mask[span].tolist() == list(whole.mask)


def test_no_conversation_is_bad_input(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match=r"train\.jsonl holds no conversation"):
        render_all([], byte_tokenizer, 40, "train.jsonl")


def test_evaluation_serves_every_conversation_once_over_the_ranks() -> None:
    lengths = np.random.default_rng(3).integers(5, 30, size=23).tolist()
    conversations = made_up(lengths)
    served = []
    for rank in range(3):
        for part in conversation_batches(
            conversations,
            context=32,
            answers_only=False,
            device_batch_rows=4,
            pad=PAD,
            rank=rank,
            world_size=3,
        ):
            served += [int(row[0]) for row in part.ids_BT]
            assert (part.weights_BT.sum(1) == (part.targets_BT != PAD).sum(1)).all()
    assert sorted(served) == list(range(1, 24))


@pytest.mark.parametrize(
    ("widths", "pieces"),
    [
        ([], []),
        ([16] * 10, [10]),  # as many rows as fit
        ([16] * 25, [9, 16]),  # a budget's worth at most
        ([16] * 8 + [64], [8, 1]),  # one long row is not worth widening eight short ones
        ([48, 64], [2]),  # a little padding costs less than a second piece
        ([400], [1]),  # a row wider than the budget goes alone
    ],
)
def test_rows_are_cut_into_pieces_where_padding_would_cost_more(widths: list[int], pieces: list[int]) -> None:
    cuts = list(slices_of_widths(widths, 256))
    assert [cut.stop - cut.start for cut in cuts] == pieces
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(len(widths)))
