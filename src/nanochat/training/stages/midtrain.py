"""Midtraining: packed conversations, every token in the loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from nanochat.data.conversations import read_conversations
from nanochat.evaluation.samples import answer_questions
from nanochat.model.gpt import GPT
from nanochat.recipes import Midtrain
from nanochat.training.bad_input import BadInput
from nanochat.training.batches import MicroBatch
from nanochat.training.conversation_loader import (
    ConversationLoader,
    RenderedConversations,
    conversation_batches,
    render_all,
)
from nanochat.training.stages.stage import Findings, Metrics, Stage

# Held-out conversations that are measured on.
EVAL_CONVERSATIONS = 1000
_LOOKED_AT_ONCE = 1 << 20  # tokens


class ConversationStage(Stage):
    """What midtraining and fine-tuning share: conversations from files, rendered once."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a conversation at most; the rest is clipped."""
        return self.recipe.model.context + 1

    def prepare(self) -> None:
        if "train" not in self.inputs.conversations:
            raise ValueError("the job names no conversations to train on")
        self._train = self._render("train", None)
        self._require_targets("train", self._train)
        # A mixture of nothing but the user's own conversations has no validation part.
        there = "validation" in self.inputs.conversations
        self._validation = self._render("validation", EVAL_CONVERSATIONS) if there else None
        if self._validation is not None:
            self._require_targets("validation", self._validation)

    @abstractmethod
    def has_targets(self, conversations: RenderedConversations) -> bool:
        """Whether any token of them counts in the loss, and so in what is measured."""

    def _require_targets(self, name: str, conversations: RenderedConversations) -> None:
        if not self.has_targets(conversations):
            file = self.inputs.conversations[name].name
            raise BadInput(
                f"{file}: none of the {len(conversations)} conversations has a token in the loss "
                f"({conversations.clipped} are clipped at {self.max_tokens} tokens); use shorter ones or a "
                "longer context"
            )

    def _render(self, name: str, at_most: int | None) -> RenderedConversations:
        path = self.inputs.conversations[name]
        conversations = islice(read_conversations(path), at_most)
        return render_all(conversations, self.tokenizer, self.max_tokens, path.name)

    def _loader(self, state: dict[str, Any] | None, global_rows: int, *, packed: bool) -> ConversationLoader:
        return ConversationLoader(
            self._train,
            context=self.recipe.model.context,
            packed=packed,
            pad=self.tokenizer.bos,
            seed=self.section.seed,
            global_rows=global_rows,
            device_batch_rows=self.job.hardware.device_batch_rows,
            rank=self.world.rank,
            world_size=self.world.size,
            state=state,
        )

    def _validation_batches(self, *, answers_only: bool) -> Iterator[MicroBatch]:
        assert self._validation is not None
        return conversation_batches(
            self._validation,
            context=self.recipe.model.context,
            answers_only=answers_only,
            device_batch_rows=self.job.hardware.device_batch_rows,
            pad=self.tokenizer.bos,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _describe(self, findings: Findings) -> None:
        findings.metrics["conversations"] = float(len(self._train))
        findings.metrics["clipped_conversations"] = float(self._train.clipped)


class MidtrainStage(ConversationStage):
    fixed_shapes = True

    @property
    def section(self) -> Midtrain:
        assert self.recipe.midtrain is not None, "the recipe has no midtraining"
        return self.recipe.midtrain

    @property
    def _global_rows(self) -> int:
        return self.section.batch_tokens // self.recipe.model.context

    @property
    def batch_tokens(self) -> int:
        return self.section.batch_tokens

    @cached_property
    def steps(self) -> int:
        """The recipe's, else as many as one pass over the rows takes."""
        if self.section.steps is not None:
            return self.section.steps
        rows = len(self.make_loader(None).plan(0))
        return math.ceil(rows / self._global_rows)

    def has_targets(self, conversations: RenderedConversations) -> bool:
        pieces = np.array_split(conversations.ids, 1 + len(conversations.ids) // _LOOKED_AT_ONCE)
        return any(self.token_bytes[piece].any() for piece in pieces)

    def make_loader(self, state: dict[str, Any] | None) -> ConversationLoader:
        return self._loader(state, self._global_rows, packed=True)

    def evaluate(self, model: GPT) -> Metrics:
        if self._validation is None:
            return {}
        batches = self._validation_batches(answers_only=False)
        return self.bits_per_byte(model, batches)

    def finish(self, model: GPT, findings: Findings) -> None:
        with self.engine(model) as engine:
            findings.samples += answer_questions(engine)
        self._describe(findings)
