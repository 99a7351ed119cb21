"""Skills: the rate of right answers to held-out questions, greedily generated.

What is asked, and what is right, is `nanochat.data.heldout`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanochat.data.heldout import HeldOutQuestion, Skill, judge
from nanochat.evaluation.intervals import Interval, wilson
from nanochat.inference.engine import Engine
from nanochat.inference.generation import Generation
from nanochat.inference.sampling import Sampling
from nanochat.inference.tools import written

# Longer than any right answer; what runs on past it is wrong anyway.
ANSWER_TOKENS = 96

WRONG_EXAMPLES = 5
# What stands for the answer to a question that fills the context.
NOT_ASKED = "(not asked: longer than the model's context)"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongAnswer:
    """A question that was missed. answer: as people read it, calculator calls in brackets."""

    question: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillResult:
    """Right answers of all questions of a skill, and some of the wrong ones."""

    skill: Skill
    correct: int
    total: int
    wrong: tuple[WrongAnswer, ...]

    @property
    def rate(self) -> float:
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of the rate."""
        return wilson(self.correct, self.total)


def evaluate_skills(
    engine: Engine, questions: Mapping[Skill, Sequence[HeldOutQuestion]], *, examples: int = WRONG_EXAMPLES
) -> dict[Skill, SkillResult]:
    """Ask everything, batched over all skills. examples: wrong answers kept for each skill.

    A question that leaves no room for an answer in the model's context is not asked, and wrong.
    """
    asked = [question for group in questions.values() for question in group]
    prompts = [engine.tokenizer.render_prompt(question.to_prompt()) for question in asked]
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) < engine.context]
    generations = engine.generate([prompts[index] for index in fitting], Sampling(max_tokens=ANSWER_TOKENS))
    given = dict(zip(fitting, generations, strict=True))
    answers: dict[Skill, list[tuple[HeldOutQuestion, Generation | None]]] = {s: [] for s in questions}
    for index, question in enumerate(asked):
        answers[question.skill].append((question, given.get(index)))
    return {skill: _result(skill, group, examples) for skill, group in answers.items()}


def _result(
    skill: Skill, answers: Sequence[tuple[HeldOutQuestion, Generation | None]], examples: int
) -> SkillResult:
    wrong = [
        WrongAnswer(
            question=question.question,
            expected=question.expected,
            answer="".join(written(generation.parts)) if generation else NOT_ASKED,
        )
        for question, generation in answers
        if generation is None
        or not judge(
            question, text=generation.text, calls=[call.expression for call in generation.tool_calls]
        )
    ]
    return SkillResult(
        skill=skill, correct=len(answers) - len(wrong), total=len(answers), wrong=tuple(wrong[:examples])
    )
