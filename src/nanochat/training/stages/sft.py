"""Fine-tuning: one conversation a row, loss on what the assistant says, accuracies and skills."""

from __future__ import annotations

import math
from typing import Any

from nanochat.data.heldout import read_held_out
from nanochat.data.questions import Question, read_questions
from nanochat.evaluation.multiple_choice import letter_ids
from nanochat.evaluation.samples import answer_questions
from nanochat.evaluation.skills import evaluate_skills
from nanochat.inference.engine import Engine
from nanochat.model.gpt import GPT
from nanochat.recipes import Sft
from nanochat.training.conversation_loader import ConversationLoader, RenderedConversations
from nanochat.training.stages.midtrain import ConversationStage
from nanochat.training.stages.stage import Findings, Metrics

ACCURACIES = ("mmlu", "arc_easy")


class SftStage(ConversationStage):
    fixed_shapes = False

    @property
    def section(self) -> Sft:
        assert self.recipe.sft is not None, "the recipe has no fine-tuning"
        return self.recipe.sft

    @property
    def max_tokens(self) -> int:
        return self.section.max_tokens or self.recipe.model.context

    @property
    def batch_tokens(self) -> int:
        return self.section.batch_rows * self.max_tokens

    @property
    def steps(self) -> int:
        return self.section.steps or math.ceil(len(self._train) / self.section.batch_rows)

    def prepare(self) -> None:
        super().prepare()
        self._questions: dict[str, list[Question]] = {
            name: list(read_questions(self.inputs.conversations[name]))[: self.section.eval_questions]
            for name in ACCURACIES
            if name in self.inputs.conversations
        }
        for question in (question for asked in self._questions.values() for question in asked):
            letter_ids(self.tokenizer, question)
        if self.section.skills:
            if "skills" not in self.inputs.conversations:
                raise ValueError("the recipe asks for skills (sft.skills), but the job names no file of them")
            self._held_out = read_held_out(self.inputs.conversations["skills"])

    def has_targets(self, conversations: RenderedConversations) -> bool:
        return bool(conversations.mask.any())

    def make_loader(self, state: dict[str, Any] | None) -> ConversationLoader:
        return self._loader(state, self.section.batch_rows, packed=False)

    def evaluate(self, model: GPT) -> Metrics:
        metrics: Metrics = {}
        if self._validation is not None:
            metrics["val_loss"] = self.loss(model, self._validation_batches(answers_only=True))
        for name, questions in self._questions.items():
            metrics |= self.accuracy(model, name, questions)
        return metrics

    def finish(self, model: GPT, findings: Findings) -> None:
        self._describe(findings)
        with self.engine(model) as engine:
            findings.samples += answer_questions(engine)
            if self.section.skills:
                self._measure_skills(engine, findings)

    def _measure_skills(self, engine: Engine, findings: Findings) -> None:
        results = evaluate_skills(engine, self._held_out)
        rows, missed = [], []
        for skill, result in results.items():
            interval = result.interval
            findings.metrics[f"skill_{skill}"] = result.rate
            findings.metrics[f"skill_{skill}_correct"] = float(result.correct)
            findings.metrics[f"skill_{skill}_questions"] = float(result.total)
            rows.append(
                {
                    "skill": skill,
                    "right": f"{result.correct} of {result.total}",
                    "rate": f"{result.rate:.1%}",
                    "interval_95": f"{interval.low:.1%}–{interval.high:.1%}",
                }
            )
            missed += [
                {"skill": skill, "question": w.question, "expected": w.expected, "answer": w.answer}
                for w in result.wrong
            ]
        findings.tables["skills"] = rows
        findings.tables["wrong_answers"] = missed
