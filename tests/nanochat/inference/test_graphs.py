"""What a CUDA graph would record, on a CPU: recording itself needs a GPU."""

from __future__ import annotations

import pytest
import torch
from standins.biased_model import BiasedModel

from nanochat.inference import graphs
from nanochat.inference.graphs import GraphedSteps
from nanochat.model.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer


def test_steps_of_fixed_shapes_say_what_steps_of_any_shape_say(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []
    monkeypatch.setattr(graphs, "KEYS", 8)
    monkeypatch.setattr(graphs, "_record", lambda run: recorded.append(run) or run)
    model = BiasedModel(byte_tokenizer, seed=3, kv_heads=2)
    plain, fixed = KVCache(model.config, 3, 20), KVCache(model.config, 3, 20)
    steps = GraphedSteps(model)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 256, (3, 40), generator=generator)
    with torch.inference_mode():
        for cache in (plain, fixed):
            model(ids_BT[:, :6], kv_cache=cache, last_only=True, lengths=[2, 6, 4])
        for step in range(6, 24):
            if step == 15:
                for cache in (plain, fixed):
                    cache.remove(1)
            unread = [1] * plain.batch
            unread[0] = int(step % 5 > 0)  # a row that waits for the calculator is not counted
            newest = ids_BT[: plain.batch, step].tolist()
            plain.reserve(plain.batch, plain.longest + 1)
            expected = model(
                torch.tensor(newest)[:, None],
                kv_cache=plain,
                last_only=True,
                lengths=None if all(unread) else unread,
            )
            torch.testing.assert_close(steps(newest, fixed, unread), expected, atol=1e-4, rtol=1e-4)
            assert fixed.lengths == plain.lengths
    assert 3 <= len(recorded) <= 8
