from __future__ import annotations

from collections.abc import Callable

import pytest

from nanochat.data.heldout import HeldOutQuestion
from nanochat.evaluation.intervals import wilson
from nanochat.evaluation.skills import WrongAnswer, evaluate_skills
from nanochat.inference.engine import Engine
from nanochat.tokenizer import Tokenizer

RIGHT_SUM = "<|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>The answer is 42."
WRONG_SUM = "<|python_start|>12+3<|python_end|><|output_start|>15<|output_end|>The answer is 42."


@pytest.fixture
def engine_for(
    byte_tokenizer: Tokenizer, script: Callable[..., object], spell: Callable[[str], list[int]]
) -> Callable[[dict[HeldOutQuestion, str]], Engine]:
    def make(answers: dict[HeldOutQuestion, str]) -> Engine:
        scripted = {
            tuple(byte_tokenizer.render_prompt(question.to_prompt())): spell(answer)
            for question, answer in answers.items()
        }
        return Engine(script(scripted, context=200), byte_tokenizer)

    return make


def test_each_skill_is_judged_by_what_it_is_about(engine_for: Callable[..., Engine]) -> None:
    answers = {
        HeldOutQuestion("name", "Who are you?", "NanoChat"): "I am NanoChat!",
        HeldOutQuestion("name", "And your name?", "NanoChat"): "I am a model.",
        HeldOutQuestion("sums", "What is 12+30?", "12+30"): RIGHT_SUM,
        HeldOutQuestion("sums", "How much is 12+30?", "12+30"): WRONG_SUM,
        HeldOutQuestion("sums", "12+30 = ?", "12+30"): "The answer is 42.",
        HeldOutQuestion("spelling", "Spell cat", " c a t"): " c a t",
        HeldOutQuestion("spelling", "Spell dog", " d o g"): " d o o g",
    }
    questions: dict[str, list[HeldOutQuestion]] = {}
    for question in answers:
        questions.setdefault(question.skill, []).append(question)
    results = evaluate_skills(engine_for(answers), questions)
    assert {skill: (result.correct, result.total) for skill, result in results.items()} == {
        "name": (1, 2),
        "sums": (1, 3),
        "spelling": (1, 2),
    }
    assert results["sums"].rate == pytest.approx(1 / 3)
    assert results["sums"].interval == wilson(1, 3)
    assert results["sums"].wrong == (
        WrongAnswer(question="How much is 12+30?", expected="12+30", answer="[12+3 = 15] The answer is 42."),
        WrongAnswer(question="12+30 = ?", expected="12+30", answer="The answer is 42."),
    )


def test_a_question_that_fills_the_context_is_wrong_and_the_others_are_asked(
    engine_for: Callable[..., Engine],
) -> None:
    fits = HeldOutQuestion("name", "Who are you?", "NanoChat")
    long = HeldOutQuestion("name", "Who are you? " * 20, "NanoChat")
    result = evaluate_skills(engine_for({fits: "I am NanoChat!"}), {"name": [long, fits]})["name"]
    assert (result.correct, result.total) == (1, 2)
    assert result.wrong[0].answer == "(not asked: longer than the model's context)"


def test_only_some_wrong_answers_are_kept(engine_for: Callable[..., Engine]) -> None:
    answers = {HeldOutQuestion("name", f"Name {number}?", "NanoChat"): "no" for number in range(8)}
    result = evaluate_skills(engine_for(answers), {"name": list(answers)}, examples=3)["name"]
    assert (result.correct, result.total, len(result.wrong)) == (0, 8, 3)


def test_a_skill_without_questions_has_no_rate_and_the_widest_interval(
    engine_for: Callable[..., Engine],
) -> None:
    filler = {HeldOutQuestion("name", "?", "NanoChat"): "NanoChat"}
    result = evaluate_skills(engine_for(filler), {"spelling": []})["spelling"]
    assert (result.total, result.rate, result.interval.low, result.interval.high) == (0, 0.0, 0.0, 1.0)
