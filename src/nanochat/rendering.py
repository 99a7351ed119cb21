"""Conversations as token ids, and which of them the assistant is trained to say.

A conversation is ``<|bos|>`` and then its turns, without separators (nanochat, October 2025)::

    <|user_start|> text <|user_end|>
    <|assistant_start|> text | python | output … <|assistant_end|>

where a calculator call is ``<|python_start|> code <|python_end|>`` and what the calculator gave is
``<|output_start|> text <|output_end|>``. A system message has no turn of its own: it goes before the first
user's text, with a blank line between.

The loss mask is True on what the assistant itself must produce: its text, its calls with both markers,
and ``<|assistant_end|>``. It is False on ``<|bos|>``, the user's turns, ``<|assistant_start|>`` and the
calculator's output with both markers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.data.conversations import Conversation, ConversationError, Message, Part

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

_MARKERS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """ids[i] is in the supervised loss where mask[i]; `clipped` where max_tokens cut something off."""

    ids: list[int]
    mask: list[bool]
    clipped: bool


def render(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = None) -> Rendered:
    """The whole conversation, cut after `max_tokens` ids.

    Raises ConversationError where turns do not alternate, ValueError where max_tokens is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1 (got {max_tokens})")
    ids = [tokenizer.bos]
    mask = [False]

    def add(tokens: Iterable[int], trained: bool) -> None:
        before = len(ids)
        ids.extend(tokens)
        mask.extend([trained] * (len(ids) - before))

    for message in _turns(conversation):
        if message.role == "user":
            add(_user_turn(tokenizer, message), False)
            continue
        add([tokenizer.special("<|assistant_start|>")], False)
        for part in _parts(message):
            add(_part(tokenizer, part), part.type != "python_output")
        add([tokenizer.special("<|assistant_end|>")], True)
    clipped = max_tokens is not None and len(ids) > max_tokens
    return Rendered(ids=ids[:max_tokens], mask=mask[:max_tokens], clipped=clipped)


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """All messages, then ``<|assistant_start|>``: what comes next is the assistant's answer.

    Raises ConversationError where turns do not alternate or the last is not the user's.
    """
    turns = _turns(conversation)
    if turns[-1].role != "user":
        raise ConversationError(
            f"message {len(conversation.messages)}: a prompt must end with a user message, this one is the "
            f"{turns[-1].role}'s"
        )
    return [*render(tokenizer, conversation).ids, tokenizer.special("<|assistant_start|>")]


def _turns(conversation: Conversation) -> list[Message]:
    """The user's and assistant's messages, a system message joined to the first."""
    turns = list(conversation.messages)
    offset = 0
    if turns and turns[0].role == "system":
        system = turns.pop(0)
        offset = 1
        if turns and turns[0].role == "user":
            turns[0] = Message("user", f"{_text(system, 1)}\n\n{_text(turns[0], 2)}")
    if not turns:
        raise ConversationError("a conversation needs at least one user message")
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            raise ConversationError(
                f"message {index + offset + 1}: role {message.role!r} where {expected!r} is due"
            )
        if message.role == "user":
            _text(message, index + offset + 1)
    return turns


def _text(message: Message, number: int) -> str:
    if isinstance(message.content, str):
        return message.content
    raise ConversationError(
        f"message {number} ({message.role}): only an assistant's content may be a list of parts"
    )


def _parts(message: Message) -> tuple[Part, ...]:
    return (Part("text", message.content),) if isinstance(message.content, str) else message.content


def _user_turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    return [
        tokenizer.special("<|user_start|>"),
        *tokenizer.encode(message.text),
        tokenizer.special("<|user_end|>"),
    ]


def _part(tokenizer: Tokenizer, part: Part) -> list[int]:
    if part.type not in _MARKERS:
        return tokenizer.encode(part.text)
    start, end = _MARKERS[part.type]
    return [tokenizer.special(start), *tokenizer.encode(part.text), tokenizer.special(end)]
