"""Multiple choice: which of the letters does the model find the likeliest next token?

The question is put as a chat turn and the letters' logits are compared at the place where the
answer begins (nanochat's way with MMLU and ARC, October 2025). Nothing is sampled, so an answer
cannot be malformed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanochat.data.questions import Question, QuestionError, to_prompt
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Right answers of all, and what guessing would reach.

    skipped: questions longer than the model's context; they are not in `total`.
    """

    correct: int
    total: int
    chance: float
    skipped: int = 0


def multiple_choice(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], *, batch: int = 32
) -> Accuracy:
    """Ask every question that fits the context. Raises QuestionError for a letter of several tokens."""
    answers = choose(model, tokenizer, questions, batch=batch)
    asked = [(question, answer) for question, answer in zip(questions, answers, strict=True) if answer]
    return Accuracy(
        correct=sum(question.answer == answer for question, answer in asked),
        total=len(asked),
        chance=sum(question.chance for question, _ in asked) / len(asked) if asked else 0.0,
        skipped=len(questions) - len(asked),
    )


@torch.no_grad()
def choose(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], *, batch: int = 32
) -> list[str | None]:
    """The model's letter for each question; None where the question is longer than the context."""
    prompts = [tokenizer.render_prompt(to_prompt(question)) for question in questions]
    letters = [letter_ids(tokenizer, question) for question in questions]
    answers: list[str | None] = [None] * len(questions)
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= model.config.context]
    # Prompts of like length share a batch, padded on the right: a later token changes no earlier one.
    fitting.sort(key=lambda index: len(prompts[index]))
    for start in range(0, len(fitting), batch):
        chosen = fitting[start : start + batch]
        longest = len(prompts[chosen[-1]])
        ids_BT = torch.tensor([[*prompts[i], *[0] * (longest - len(prompts[i]))] for i in chosen])
        lengths = [len(prompts[i]) for i in chosen]
        logits_B1V = model(ids_BT.to(model.device), last_only=True, lengths=lengths).cpu()
        for row, index in enumerate(chosen):
            best = int(logits_B1V[row, 0, letters[index]].argmax())
            answers[index] = questions[index].letters[best]
    return answers


def letter_ids(tokenizer: Tokenizer, question: Question) -> list[int]:
    """The token of each of the question's letters. Raises QuestionError for a letter of several."""
    found = []
    for letter in question.letters:
        ids = tokenizer.encode(letter)
        if len(ids) != 1:
            raise QuestionError(
                f"question {question.id}: the letter {letter!r} is {len(ids)} tokens of this tokenizer; "
                "multiple choice needs letters that are one"
            )
        found += ids
    return found
