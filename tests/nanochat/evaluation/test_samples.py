from __future__ import annotations

from collections.abc import Callable

from nanochat.data.conversations import Conversation, Message
from nanochat.evaluation.samples import answer_questions, continue_texts
from nanochat.inference.engine import Engine
from nanochat.tokenizer import Tokenizer


def test_texts_are_continued_from_bos(
    byte_tokenizer: Tokenizer, script: Callable[..., object], spell: Callable[[str], list[int]]
) -> None:
    answers = {tuple(spell(f"<|bos|>{text}")): spell(f" {text[::-1]}") for text in ("abc", "zyx")}
    engine = Engine(script(answers), byte_tokenizer)
    assert continue_texts(engine, ["zyx", "abc", "far too long " * 9]) == [
        {"prompt": "zyx", "text": " xyz"},
        {"prompt": "abc", "text": " cba"},
    ]


def test_questions_are_answered_as_a_chat_with_the_calls_written_out(
    byte_tokenizer: Tokenizer, script: Callable[..., object], spell: Callable[[str], list[int]]
) -> None:
    prompt = byte_tokenizer.render_prompt(Conversation((Message("user", "1+2?"),)))
    said = spell("<|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>The answer is 3.")
    engine = Engine(script({tuple(prompt): said}), byte_tokenizer)
    assert answer_questions(engine, ["1+2?"]) == [{"prompt": "1+2?", "text": "[1+2 = 3] The answer is 3."}]
