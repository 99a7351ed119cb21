from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanochat.evaluation.bpb import ByteLoss, byte_loss
from nanochat.model.gpt import GPT
from nanochat.recipes import Model
from nanochat.training.batches import MicroBatch, micro_batch

VOCAB = 10
TOKEN_BYTES = np.array([1, 2, 3, 4, 1, 1, 1, 1, 1, 0])
SPECIAL = 9


def model(seed: int) -> GPT:
    made = GPT(Model(depth=1, width=8, heads=2, kv_heads=2, context=16), VOCAB)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def batch(seed: int) -> MicroBatch:
    """Rows of which a third of the targets does not count."""
    random = np.random.default_rng(seed)
    return micro_batch(random.integers(0, VOCAB, (3, 9)), random.random((3, 9)) < 2 / 3)


def test_bits_per_byte_equals_the_sum_by_hand() -> None:
    network, batches = model(0), [batch(1), batch(2)]
    nats, total_bytes, tokens = 0.0, 0, 0
    for judged in batches:
        logits = network(judged.ids_BT).detach()
        for row in range(3):
            for column in range(8):
                target = int(judged.targets_BT[row, column])
                if target == SPECIAL or not judged.weights_BT[row, column]:
                    continue
                probabilities = logits[row, column].softmax(dim=-1)
                nats -= math.log(float(probabilities[target]))
                total_bytes += int(TOKEN_BYTES[target])
                tokens += 1
    loss = byte_loss(network, batches, TOKEN_BYTES)
    assert 0 < tokens < 40
    assert (loss.bytes, loss.tokens) == (total_bytes, tokens)
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert loss.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / total_bytes, rel=1e-5)


def test_an_untrained_model_needs_the_bits_of_a_uniform_choice() -> None:
    network = model(0)
    network.init_weights(0)
    ones = micro_batch(np.full((2, 5), 1))
    assert byte_loss(network, [ones], TOKEN_BYTES).bits_per_byte == pytest.approx(math.log2(VOCAB) / 2)


def test_parts_of_ranks_add_up_to_the_whole() -> None:
    network = model(3)
    parts = byte_loss(network, [batch(1)], TOKEN_BYTES) + byte_loss(network, [batch(2)], TOKEN_BYTES)
    whole = byte_loss(network, [batch(1), batch(2)], TOKEN_BYTES)
    assert parts.bits_per_byte == pytest.approx(whole.bits_per_byte)


def test_text_without_bytes_is_an_error_and_not_a_nought() -> None:
    only_special = micro_batch(np.full((1, 4), SPECIAL))
    with pytest.raises(ValueError, match="special tokens"):
        _ = byte_loss(model(0), [only_special], TOKEN_BYTES).bits_per_byte
    with pytest.raises(ValueError, match="special tokens"):
        _ = ByteLoss().nats_per_token
