"""What it costs a model to be held in smaller numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.data.hub import HubError
from nanochat.data.parquet import iter_texts
from nanochat.data.shards import ShardError, shard_path
from nanochat.data.sources import get_source
from nanochat.evaluation.bpb import byte_loss
from nanochat.inference.chat import ChatError, Source, load_engine
from nanochat.inference.engine import Engine
from nanochat.inference.formats import WeightFormat
from nanochat.inference.quantized import matrix_bytes
from nanochat.recipe_book import load_recipes
from nanochat.store.objects import ObjectStore
from nanochat.training.bad_input import BadInput
from nanochat.training.packing import DocumentStream, Row
from nanochat.training.shard_loader import evaluation_batches, evaluation_rows

_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class FormatLoss:
    """bits_per_byte: of the validation text. matrix_bytes: what is read of the matrices for a token."""

    format: WeightFormat
    bits_per_byte: float
    matrix_bytes: int


def format_losses(
    store: ObjectStore, model: str, source: Source, formats: Sequence[WeightFormat], tokens: int
) -> Iterator[FormatLoss]:
    """Measured on the same first `tokens` of the model's validation shard, one format after the other.

    Raises ChatError where the model, the text, or the model in a format is not to be had.
    """
    rows: list[Row] | None = None
    for format in formats:
        engine = load_engine(store, model, source, "cpu", weights=format)
        if rows is None:
            rows = _validation_rows(store, model, engine, tokens)
        token_bytes = np.asarray(engine.tokenizer.token_bytes())
        loss = byte_loss(engine.model, evaluation_batches(rows, _ROWS), token_bytes)
        yield FormatLoss(
            format=format, bits_per_byte=loss.bits_per_byte, matrix_bytes=matrix_bytes(engine.model)
        )


def _validation_rows(store: ObjectStore, model: str, engine: Engine, tokens: int) -> list[Row]:
    data = get_source(load_recipes()[model].data.source)
    try:
        stream = DocumentStream(
            [shard_path(store, data.name, data.validation_shard())],
            open_shard=iter_texts,
            encode=engine.tokenizer.encode_batch,
            bos=engine.tokenizer.bos,
            passes=1,
        )
        return evaluation_rows(stream, engine.context, tokens)
    except (ShardError, HubError, BadInput) as error:
        raise ChatError(str(error)) from error
