from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nanochat.data.questions import Question, QuestionError, to_prompt
from nanochat.evaluation.multiple_choice import choose, multiple_choice
from nanochat.model.gpt import GPT
from nanochat.recipes import Model
from nanochat.tokenizer import Tokenizer


def question(number: int, answer: str, letters: str = "ABCD", words: int = 1) -> Question:
    return Question(
        id=str(number),
        question=f"Which is number {number}? " + "really " * words,
        choices=tuple(f"choice {letter}" for letter in letters),
        letters=tuple(letters),
        answer=answer,
    )


class Answering(GPT):
    """Likes, at the end of a prompt, the letter of the question it has read; elsewhere another one."""

    def __init__(self, tokenizer: Tokenizer, says: dict[tuple[int, ...], str], context: int) -> None:
        super().__init__(Model(depth=1, width=2, heads=1, kv_heads=1, context=context), tokenizer.vocab_size)
        self.tokenizer, self.says = tokenizer, says

    def forward(
        self,
        ids_BT: Tensor,
        kv_cache: object = None,
        last_only: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        assert last_only
        assert lengths is not None
        logits_B1V = torch.zeros(len(ids_BT), 1, self.vocab_size)
        for row, length in enumerate(lengths):
            letter = self.says[tuple(ids_BT[row, :length].tolist())]
            logits_B1V[row, 0, self.tokenizer.encode(letter)[0]] = 1.0
            # What is likelier than any letter is no answer.
            logits_B1V[row, 0, self.tokenizer.encode("z")[0]] = 9.0
        return logits_B1V


@pytest.fixture(scope="module")
def ask(byte_tokenizer: Tokenizer) -> Callable[[list[Question], list[str], int], Answering]:
    def make(questions: list[Question], says: list[str], context: int = 400) -> Answering:
        prompts = [tuple(byte_tokenizer.render_prompt(to_prompt(asked))) for asked in questions]
        return Answering(byte_tokenizer, dict(zip(prompts, says, strict=True)), context)

    return make


def test_the_likeliest_letter_at_the_prompts_end_is_the_answer(
    byte_tokenizer: Tokenizer, ask: Callable[..., Answering]
) -> None:
    questions = [question(number, "B", words=number * 5 % 7) for number in range(10)]
    says = list("BABBCDBBAB")
    model = ask(questions, says)
    for batch in (1, 3, 32):
        assert choose(model, byte_tokenizer, questions, batch=batch) == says
    accuracy = multiple_choice(model, byte_tokenizer, questions)
    assert (accuracy.correct, accuracy.total, accuracy.skipped) == (6, 10, 0)
    assert accuracy.chance == 0.25


def test_chance_is_that_of_each_questions_own_choices(
    byte_tokenizer: Tokenizer, ask: Callable[..., Answering]
) -> None:
    questions = [question(0, "A", letters="ABCD"), question(1, "1", letters="12")]
    accuracy = multiple_choice(ask(questions, ["A", "2"]), byte_tokenizer, questions)
    assert accuracy.chance == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert accuracy.correct == 1


def test_a_letter_that_is_no_choice_of_the_question_cannot_win(
    byte_tokenizer: Tokenizer, ask: Callable[..., Answering]
) -> None:
    questions = [question(0, "A", letters="AB")]
    assert choose(ask(questions, ["D"]), byte_tokenizer, questions)[0] in ("A", "B")


def test_questions_longer_than_the_context_are_skipped_and_counted(
    byte_tokenizer: Tokenizer, ask: Callable[..., Answering]
) -> None:
    questions = [question(0, "A"), question(1, "A", words=100)]
    accuracy = multiple_choice(ask(questions, ["A", "A"]), byte_tokenizer, questions)
    assert (accuracy.correct, accuracy.total, accuracy.skipped) == (1, 1, 1)


def test_no_questions_say_nothing(byte_tokenizer: Tokenizer, ask: Callable[..., Answering]) -> None:
    accuracy = multiple_choice(ask([], []), byte_tokenizer, [])
    assert (accuracy.correct, accuracy.total, accuracy.chance) == (0, 0, 0.0)


def test_a_letter_of_several_tokens_is_refused(
    byte_tokenizer: Tokenizer, ask: Callable[..., Answering]
) -> None:
    asked = Question(id="0", question="?", choices=("x", "y"), letters=("A", "É"), answer="A")
    with pytest.raises(QuestionError, match="question 0: the letter 'É' is 2 tokens"):
        multiple_choice(ask([asked], ["A"]), byte_tokenizer, [asked])


def test_a_real_model_answers_the_same_alone_and_in_a_batch(byte_tokenizer: Tokenizer) -> None:
    model = GPT(Model(depth=2, width=32, heads=4, kv_heads=2, context=400), byte_tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    # All prompts end alike: only a model that looks back strongly can tell them apart.
    for block in model.blocks:
        block.attn.c_proj.weight.data *= 30
    questions = [question(number, "A", letters="ABCDEFGHIJ", words=number) for number in range(12)]
    alone = []
    for asked in questions:
        prompt = byte_tokenizer.render_prompt(to_prompt(asked))
        logits = model(torch.tensor([prompt])).detach()[0, -1]
        alone.append(max("ABCDEFGHIJ", key=lambda letter: float(logits[byte_tokenizer.encode(letter)[0]])))
    assert choose(model, byte_tokenizer, questions, batch=5) == alone
    assert len(set(alone)) > 1
