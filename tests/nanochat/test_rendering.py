from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.data.conversations import Conversation, ConversationError, Message, Part, exchange
from nanochat.data.questions import Question, to_conversation
from nanochat.recipes import gpt4_pattern
from nanochat.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "masks.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """No merges: a token is a byte, so ids can be worked out by hand."""
    return Tokenizer(pattern=gpt4_pattern(r"\p{N}{1,2}"), ranks=[bytes([byte]) for byte in range(256)])


def golden(case: dict[str, Any]) -> tuple[list[int], list[bool]]:
    ids = [token for _, _, tokens in case["rendered"] for token in tokens]
    mask = [bool(value) for _, value, tokens in case["rendered"] for _ in tokens]
    return ids, mask


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_renders_to_the_ids_and_mask_worked_out_by_hand(
    name: str, byte_tokenizer: Tokenizer
) -> None:
    rendered = byte_tokenizer.render(Conversation.from_json(CASES[name]["messages"]))
    ids, mask = golden(CASES[name])
    assert rendered.ids == ids
    assert rendered.mask == mask
    assert not rendered.clipped


def test_the_golden_multiple_choice_case_is_what_a_question_becomes() -> None:
    question = Question(id="1", question="1+1?", choices=("2", "3"), letters=("A", "B"), answer="A")
    assert to_conversation(question) == Conversation.from_json(CASES["multiple choice"]["messages"])


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_is_the_conversation_up_to_its_last_answer(name: str, byte_tokenizer: Tokenizer) -> None:
    conversation = Conversation.from_json(CASES[name]["messages"])
    ids, _ = golden(CASES[name])
    last_answer = len(ids) - 1 - ids[::-1].index(259)
    prompt = byte_tokenizer.render_prompt(Conversation(conversation.messages[:-1]))
    assert prompt == ids[: last_answer + 1]


def test_a_long_conversation_is_clipped_and_says_so(byte_tokenizer: Tokenizer) -> None:
    conversation = exchange("Hi", "Yo!")
    whole = byte_tokenizer.render(conversation)
    clipped = byte_tokenizer.render(conversation, max_tokens=7)
    assert clipped.ids == whole.ids[:7]
    assert clipped.mask == whole.mask[:7]
    assert clipped.clipped
    assert byte_tokenizer.render(conversation, max_tokens=len(whole.ids)) == whole
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        byte_tokenizer.render(conversation, max_tokens=0)


@pytest.mark.parametrize("marker", ["<|assistant_start|>", "<|python_start|>", "<|output_end|>"])
def test_special_tokens_in_anyones_text_stay_text(marker: str, byte_tokenizer: Tokenizer) -> None:
    parts = (Part("text", marker), Part("python", marker), Part("python_output", marker))
    messages = (Message("system", marker), Message("user", marker), Message("assistant", parts))
    ids = byte_tokenizer.render(Conversation(messages)).ids
    # bos; user start and end; assistant start, python start and end, output start and end, assistant end
    assert [token for token in ids if token > 255] == [256, 257, 258, 259, 261, 262, 263, 264, 260]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one user message"),
        ([("system", "s")], "at least one user message"),
        ([("assistant", "a")], "message 1: role 'assistant' where 'user' is due"),
        ([("user", "u"), ("user", "v")], "message 2: role 'user' where 'assistant' is due"),
        ([("system", "s"), ("assistant", "a")], "message 2: role 'assistant' where 'user' is due"),
        ([("user", "u"), ("assistant", "a"), ("system", "s")], "message 3: role 'system' where 'user'"),
        ([("system", "s"), ("user", (Part("text", "u"),))], "message 2 .user.: only an assistant's content"),
        ([("user", (Part("text", "u"),))], "message 1 .user.: only an assistant's content"),
    ],
)
def test_turns_that_cannot_be_rendered_are_refused_by_number(
    messages: list[Any], complaint: str, byte_tokenizer: Tokenizer
) -> None:
    conversation = Conversation(tuple(Message(role, content) for role, content in messages))
    with pytest.raises(ConversationError, match=complaint):
        byte_tokenizer.render(conversation)


def test_a_prompt_that_waits_for_the_user_is_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConversationError, match="message 2: a prompt must end with a user message"):
        byte_tokenizer.render_prompt(exchange("Hi", "Yo!"))
