from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.conversations import (
    Conversation,
    ConversationError,
    Message,
    Part,
    dumps,
    exchange,
    problem,
    read_conversations,
    require_valid,
    validate_conversations,
    write_conversations,
)

SUM = exchange("2+2?", (Part("python", "2+2"), Part("python_output", "4"), Part("text", "The answer is 4.")))
GOOD = '{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}'


def lines(*messages: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]})


def file_of(folder: Path, *rows: str | bytes) -> Path:
    path = folder / "own.jsonl"
    path.write_bytes(b"".join((row.encode() if isinstance(row, str) else row) + b"\n" for row in rows))
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    system = Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "Grüße 😀\nline"),
            Message("assistant", "Hi\u2028there"),
            Message("user", "2+2?"),
            SUM.messages[1],
        )
    )
    path = tmp_path / "conversations.jsonl"
    assert write_conversations(path, [SUM, system]) == 2
    assert list(read_conversations(path)) == [SUM, system]
    assert path.read_bytes().count(b"\n") == 2, "a line separator inside a text is no line of the file"
    assert validate_conversations(path) == []


def test_a_bare_array_of_messages_is_the_same_conversation(tmp_path: Path) -> None:
    bare = json.dumps(json.loads(GOOD)["messages"])
    first, second = read_conversations(file_of(tmp_path, GOOD, bare))
    assert first == second


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = file_of(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r", "", "  ", GOOD)
    assert len(list(read_conversations(path))) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("3", "got a number"),
        ("{}", '"messages"'),
        ('{"messages": "hi"}', "must be an array, got a string"),
        ('{"messages": []}', "no messages"),
        ('{"messages": [], "id": 3}', "unknown field 'id'"),
        ('[{"role": "user", "content": "a", "name": "b"}]', "message 1: unknown field 'name'"),
        ('[{"role": "user"}]', 'message 1: the field "content" is missing'),
        ('["hi"]', "message 1: expected an object, got a string"),
        (lines(("user", "a"), ("assistant", 3)), 'message 2: "content" must be a string or an array'),
        (lines(("user", "a"), ("assistant", None)), "got null"),
        (lines(("tool", "a")), "role 'tool' is unknown (known: system, user, assistant)"),
        (lines(("assistant", "a")), "message 1: role 'assistant' where 'user' is due"),
        (lines(("user", "a"), ("user", "b")), "message 2: role 'user' where 'assistant' is due"),
        (lines(("user", "a"), ("assistant", "b"), ("system", "c")), "message 3: role 'system'"),
        (lines(("system", "a"), ("assistant", "b")), "message 2: role 'assistant' where 'user' is due"),
        (lines(("system", "a")), "a user message must follow"),
        (lines(("user", "a")), "the last message must be the assistant's"),
        (lines(("user", " \n"), ("assistant", "b")), "message 1 (user): the content is empty"),
        (lines(("user", "a"), ("assistant", "")), "message 2 (assistant): the content is empty"),
        (lines(("user", "a"), ("assistant", [])), "the list of parts is empty"),
        (lines(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")), "only an assistant's"),
        (lines(("user", "a"), ("assistant", [{"type": "image", "text": "b"}])), "type 'image' is unknown"),
        (lines(("user", "a"), ("assistant", [{"type": "text"}])), '"text" must be a string, got null'),
        (
            lines(("user", "a"), ("assistant", [{"type": "text", "text": ""}])),
            "part 1 (text): the text is empty",
        ),
        (
            lines(("user", "a"), ("assistant", [{"type": "python_output", "text": "4"}])),
            "python_output must follow a python part",
        ),
        (b'[{"role": "user", "content": "\xff"}]', "is not UTF-8"),
        ('[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]', "surrogate"),
        ("[" * 100_000, "not usable JSON"),
        ("1" * 5_000, "not usable JSON"),
    ],
)
def test_a_wrong_line_is_named_with_its_number_and_reason(
    tmp_path: Path, row: str | bytes, reason: str
) -> None:
    path = file_of(tmp_path, GOOD, "", row, GOOD)
    (found,) = validate_conversations(path)
    assert found.startswith("line 3: ")
    assert reason in found
    with pytest.raises(ConversationError, match=r"own\.jsonl:3: "):
        list(read_conversations(path))


def test_every_wrong_line_of_a_file_is_reported_and_many_are_summed_up(tmp_path: Path) -> None:
    path = file_of(tmp_path, *["{}"] * 30, GOOD)
    assert len(validate_conversations(path)) == 30
    with pytest.raises(
        ConversationError, match=r"30 problems(.|\n)*line 1: (.|\n)*line 20: (.|\n)*and 10 more"
    ):
        require_valid(path)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "does not exist"), (b"", "is empty"), (b"\n \n", "is empty")]
)
def test_a_missing_or_empty_file_is_said_to_be_so(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "own.jsonl"
    if content is not None:
        path.write_bytes(content)
    (found,) = validate_conversations(path)
    assert found.startswith(f"file: {reason}")
    with pytest.raises(ConversationError, match=reason):
        list(read_conversations(path))
    with pytest.raises(ConversationError, match=reason):
        require_valid(path)


def test_a_folder_in_place_of_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="is a directory"):
        require_valid(tmp_path)


def test_a_prompt_may_lack_its_answer_and_cannot_be_trained_on() -> None:
    prompt = Conversation((Message("user", "hi"),))
    assert "assistant's" in str(problem(prompt))
    assert problem(SUM) is None


def test_the_text_of_a_message_is_its_parts_in_order() -> None:
    assert SUM.messages[1].text == "2+24The answer is 4."


@given(
    st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1).filter(
        lambda turns: all(text.strip() for turn in turns for text in turn)
    )
)
def test_any_text_survives_a_line(turns: list[tuple[str, str]]) -> None:
    messages = tuple(
        message
        for user, assistant in turns
        for message in (Message("user", user), Message("assistant", assistant))
    )
    conversation = Conversation(messages)
    if problem(conversation) is None:
        line = dumps(conversation)
        assert "\n" not in line
        assert Conversation.from_json(json.loads(line)) == conversation
