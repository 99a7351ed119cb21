"""Conversations: what a chat model is trained on, and the JSONL files that hold them.

A line of a file is one conversation::

    {"messages": [{"role": "user", "content": "2+2?"},
                  {"role": "assistant", "content": [{"type": "python", "text": "2+2"},
                                                    {"type": "python_output", "text": "4"},
                                                    {"type": "text", "text": "4"}]}]}

A bare array of messages, the form of the published identity files, is read too. Roles alternate,
beginning with the user (a system message may come before) and ending with the assistant. Only the
assistant's content may be a list of parts: text, a calculator call, and what the calculator gave.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

Role = Literal["system", "user", "assistant"]
PartType = Literal["text", "python", "python_output"]

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
PART_TYPES: tuple[PartType, ...] = ("text", "python", "python_output")

_PROBLEMS_SHOWN = 20


class ConversationError(ValueError):
    """A conversation, or a file of them, that cannot be used: which file and line, and why."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an assistant's message: text, a calculator call, or that call's output."""

    type: PartType
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Only an assistant's content may be a tuple of parts."""

    role: Role
    content: str | tuple[Part, ...]

    @property
    def text(self) -> str:
        """The content as people read it: the parts' text one after another."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. Building one checks nothing, since a prompt is a conversation that still
    lacks its answer; `problem` says whether it can be trained on."""

    messages: tuple[Message, ...]

    def to_json(self) -> dict[str, Any]:
        """The value of a JSONL line."""
        return {"messages": [_message_to_json(message) for message in self.messages]}

    @staticmethod
    def from_json(document: object) -> Conversation:
        """Read the value of a JSONL line, an object with `messages` or a bare array of messages.

        Raises ConversationError saying what is wrong with which message.
        """
        conversation = Conversation(tuple(_messages_from_json(document)))
        wrong = problem(conversation)
        if wrong:
            raise ConversationError(wrong)
        return conversation


def exchange(question: str, answer: str | Iterable[Part]) -> Conversation:
    """A conversation of one question and its answer."""
    content = answer if isinstance(answer, str) else tuple(answer)
    return Conversation((Message("user", question), Message("assistant", content)))


def problem(conversation: Conversation) -> str | None:
    """Why `conversation` cannot be trained on; None where it can."""
    messages = conversation.messages
    if not messages:
        return "no messages"
    turns = messages[1:] if messages[0].role == "system" else messages
    offset = len(messages) - len(turns)
    if not turns:
        return "a system message alone; a user message must follow it"
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            return (
                f"message {index + offset + 1}: role {message.role!r} where {expected!r} is due "
                "(user and assistant alternate, a system message may come first)"
            )
    if turns[-1].role != "assistant":
        return f"message {len(messages)}: the last message must be the assistant's"
    for number, message in enumerate(messages, start=1):
        wrong = _content_problem(message)
        if wrong:
            return f"message {number} ({message.role}): {wrong}"
    return None


def _content_problem(message: Message) -> str | None:
    if isinstance(message.content, str):
        if not message.content.strip():
            return "the content is empty"
        return _text_problem(message.content)
    if message.role != "assistant":
        return "only an assistant's content may be a list of parts"
    if not message.content:
        return "the list of parts is empty"
    previous: PartType | None = None
    for number, part in enumerate(message.content, start=1):
        if not part.text:
            return f"part {number} ({part.type}): the text is empty"
        if part.type == "python_output" and previous != "python":
            return f"part {number}: a python_output must follow a python part"
        wrong = _text_problem(part.text)
        if wrong:
            return f"part {number} ({part.type}): {wrong}"
        previous = part.type
    return None


def _text_problem(text: str) -> str | None:
    # JSON can spell half of a surrogate pair ("\ud83d"), which no tokenizer can encode.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is half of a surrogate pair, which is not valid Unicode"
    return None


def _message_to_json(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    return {
        "role": message.role,
        "content": [{"type": part.type, "text": part.text} for part in message.content],
    }


def _messages_from_json(document: object) -> Iterator[Message]:
    if isinstance(document, dict):
        _reject_unknown(document, {"messages"}, "the conversation")
        if "messages" not in document:
            raise ConversationError('an object must have the field "messages"')
        document = document["messages"]
        if not isinstance(document, list):
            raise ConversationError(f'"messages" must be an array, got {_kind(document)}')
    if not isinstance(document, list):
        raise ConversationError(
            f'expected {{"messages": […]}} or an array of messages, got {_kind(document)}'
        )
    for number, message in enumerate(document, start=1):
        yield _message_from_json(message, f"message {number}")


def _message_from_json(document: object, where: str) -> Message:
    if not isinstance(document, dict):
        raise ConversationError(f"{where}: expected an object, got {_kind(document)}")
    _reject_unknown(document, {"role", "content"}, where)
    for field in ("role", "content"):
        if field not in document:
            raise ConversationError(f'{where}: the field "{field}" is missing')
    role = document["role"]
    if role not in ROLES:
        raise ConversationError(f"{where}: role {role!r:.40} is unknown (known: {', '.join(ROLES)})")
    content = document["content"]
    if isinstance(content, list):
        parts = tuple(
            _part_from_json(part, f"{where}, part {number}") for number, part in enumerate(content, start=1)
        )
        return Message(role, parts)
    if not isinstance(content, str):
        raise ConversationError(
            f'{where}: "content" must be a string or an array of parts, got {_kind(content)}'
        )
    return Message(role, content)


def _part_from_json(document: object, where: str) -> Part:
    if not isinstance(document, dict):
        raise ConversationError(f"{where}: expected an object, got {_kind(document)}")
    _reject_unknown(document, {"type", "text"}, where)
    kind, text = document.get("type"), document.get("text")
    if kind not in PART_TYPES:
        raise ConversationError(f"{where}: type {kind!r:.40} is unknown (known: {', '.join(PART_TYPES)})")
    if not isinstance(text, str):
        raise ConversationError(f'{where}: "text" must be a string, got {_kind(text)}')
    return Part(cast(PartType, kind), text)


def _reject_unknown(document: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(document) - known)
    if unknown:
        raise ConversationError(
            f"{where}: unknown field {', '.join(f'{name!r:.40}' for name in unknown)} "
            f"(known: {', '.join(sorted(known))})"
        )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# --------------------------------------------------------------------------------------------------
# Files


def read_conversations(path: str | os.PathLike[str]) -> Iterator[Conversation]:
    """The conversations of a JSONL file, in order. Blank lines are passed over.

    Raises ConversationError naming the file and the line at the first problem, or the file where it
    is missing or holds no conversation.
    """
    for number, result in _lines(Path(path)):
        if isinstance(result, str):
            raise ConversationError(_at(Path(path), number, result))
        yield result


def validate_conversations(path: str | os.PathLike[str]) -> list[str]:
    """Every problem of a JSONL file as ``line 3: …`` (``file: …`` where it cannot be read at all).

    An empty list means that the file can be trained on.
    """
    return [
        f"line {number}: {result}" if number else f"file: {result}"
        for number, result in _lines(Path(path))
        if isinstance(result, str)
    ]


def require_valid(path: str | os.PathLike[str]) -> None:
    """Raises ConversationError with the problems of `path`, up to 20 of them."""
    problems = validate_conversations(path)
    if not problems:
        return
    shown = "\n  ".join(problems[:_PROBLEMS_SHOWN])
    more = f"\n  … and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
    raise ConversationError(
        f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in this file of conversations; "
        f"correct the lines named and start again:\n  {shown}{more}"
    )


def write_conversations(path: str | os.PathLike[str], conversations: Iterable[Conversation]) -> int:
    """Write a JSONL file (UTF-8, one conversation a line) and return the number of lines."""
    rows = 0
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for conversation in conversations:
            file.write(dumps(conversation))
            file.write("\n")
            rows += 1
    return rows


def dumps(conversation: Conversation) -> str:
    """One JSONL line, without its line feed; equal conversations give equal lines."""
    return json.dumps(conversation.to_json(), ensure_ascii=False, separators=(",", ":"))


def _lines(path: Path) -> Iterator[tuple[int, Conversation | str]]:
    """(line number, conversation or problem) of every line that is not blank; number 0 is the file."""
    if not path.is_file():
        yield 0, "is a directory" if path.is_dir() else "does not exist"
        return
    empty = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            empty = False
            yield number, _parse(raw)
    if empty:
        yield 0, "is empty; a line holds one conversation"


def _parse(raw: bytes) -> Conversation | str:
    try:
        return Conversation.from_json(json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
    except ConversationError as error:
        return str(error)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return f"not usable JSON: {error}"


def _at(path: Path, number: int, problem_text: str) -> str:
    return f"{path}:{number}: {problem_text}" if number else f"{path}: {problem_text}"
