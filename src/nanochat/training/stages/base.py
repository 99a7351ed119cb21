"""Pretraining: text from the shards, validation bits per byte, what n-gram models make of the same text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.data.parquet import iter_texts
from nanochat.evaluation.ngram import compressor_baselines, ngram_baselines
from nanochat.evaluation.samples import continue_texts
from nanochat.model.gpt import GPT
from nanochat.recipes import Base
from nanochat.training.packing import DocumentStream, Row, StreamPosition
from nanochat.training.shard_loader import ShardLoader, evaluation_batches, evaluation_rows
from nanochat.training.stages.stage import Findings, Metrics, Stage

SAMPLE_TOKENS = 32


class BaseStage(Stage):
    fixed_shapes = True

    @property
    def section(self) -> Base:
        return self.recipe.base

    @property
    def steps(self) -> int:
        return self.section.steps

    @property
    def batch_tokens(self) -> int:
        return self.section.batch_tokens

    def prepare(self) -> None:
        if self.inputs.validation is None:
            raise ValueError("the job names no validation shard")
        stream = self._stream([self.inputs.validation], passes=1)
        context, tokens = self.recipe.model.context, self.section.eval_tokens
        self._validation: list[Row] = evaluation_rows(stream, context, tokens)

    def _stream(self, shards: list[Any], passes: int | None) -> DocumentStream:
        threads = self.job.hardware.threads
        return DocumentStream(
            shards,
            open_shard=self._open,
            encode=lambda texts: self.tokenizer.encode_batch(texts, threads),
            bos=self.tokenizer.bos,
            passes=passes,
        )

    def _open(self, shard: Path, start: int) -> Iterator[tuple[int, str]]:
        return iter_texts(self.inputs.arrivals.wait_for(shard), start)

    def make_loader(self, state: dict[str, Any] | None) -> ShardLoader:
        if state:
            self.inputs.arrivals.go_on_at(self.inputs.shards[state["shard"]])
        return ShardLoader(
            self._stream(list(self.inputs.shards), passes=None),
            context=self.recipe.model.context,
            global_rows=self.section.batch_tokens // self.recipe.model.context,
            device_batch_rows=self.job.hardware.device_batch_rows,
            rank=self.world.rank,
            world_size=self.world.size,
            state=state,
        )

    def evaluate(self, model: GPT) -> Metrics:
        batches = evaluation_batches(
            self._validation, self.job.hardware.device_batch_rows, self.world.rank, self.world.size
        )
        return self.bits_per_byte(model, batches)

    def finish(self, model: GPT, findings: Findings) -> None:
        with self.engine(model) as engine:
            findings.samples += continue_texts(engine, self.section.sample_prompts, SAMPLE_TOKENS)
        if self.section.ngram_baselines:
            self._compare(findings)

    def _compare(self, findings: Findings) -> None:
        bits = ngram_baselines(
            self._training_tokens(),
            iter(self._validation),
            bos=self.tokenizer.bos,
            token_bytes=self.token_bytes,
        )
        bits = {name.removesuffix("_kn"): value for name, value in bits.items()}
        assert self.inputs.validation is not None
        bits |= compressor_baselines([text for _, text in iter_texts(self.inputs.validation)])
        findings.metrics |= {f"{name}_bpb": value for name, value in bits.items()}
        own = findings.metrics["val_bpb"]
        findings.tables["bits_per_byte"] = [
            {"predictor": name, "bits_per_byte": round(bpb, 4), "model_is_below_by": f"{1 - own / bpb:.1%}"}
            for name, bpb in {"this model": own, **bits}.items()
        ]

    def _training_tokens(self) -> Iterator[Row]:
        for shard in self.inputs.shards:
            documents = self._stream([shard], passes=1).documents(StreamPosition())
            yield np.concatenate([np.array(tokens, dtype=np.uint32) for _, tokens in documents])
