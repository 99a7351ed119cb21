"""`nanochat bpb`: what smaller weights cost."""

from __future__ import annotations

import pytest

from nanochat.data.shards import ingest_shards
from nanochat.data.sources import get_source
from nanochat.inference.chat import ChatError
from nanochat.inference.formats import WeightFormat
from nanochat.serving.formats import format_losses
from nanochat.store import ObjectStore


def test_each_format_is_measured_on_the_same_text(chat_store: ObjectStore) -> None:
    source = get_source("offline")
    ingest_shards(chat_store, source, [source.validation_shard()])
    formats = [WeightFormat.FLOAT, WeightFormat.INT8]
    trained, small = format_losses(chat_store, "quick", "sft", formats, 500)
    # It has learned four texts by heart and knows no other, so the figure is high.
    assert trained.bits_per_byte > 2
    assert 0 < abs(small.bits_per_byte - trained.bits_per_byte) < 0.02 * trained.bits_per_byte
    assert small.matrix_bytes < trained.matrix_bytes / 3


def test_what_is_not_to_be_had_is_named(chat_store: ObjectStore) -> None:
    with pytest.raises(ChatError, match=r"of offline is .*Get it: "):
        list(format_losses(chat_store, "quick", "sft", [WeightFormat.FLOAT], 500))
    with pytest.raises(ChatError, match="int4 weights need a width that is a multiple of 64, not 48"):
        list(format_losses(chat_store, "quick", "sft", [WeightFormat.INT4], 500))
