from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.conversations import Part
from nanochat.inference.calculator import Calculator
from nanochat.inference.tools import ToolMachine, join_pieces, written
from nanochat.tokenizer import Tokenizer


@given(
    data=st.one_of(
        st.binary(max_size=30), st.text(max_size=12).map(lambda text: text.encode(errors="ignore"))
    )
)
def test_pieces_join_to_the_text_of_all_bytes_however_broken(byte_tokenizer: Tokenizer, data: bytes) -> None:
    machine = ToolMachine(byte_tokenizer, Calculator())
    pieces = [piece for token in data for piece in machine.read(token)] + machine.finish()
    assert "".join(piece.text for piece in pieces) == data.decode("utf-8", "replace")


def test_nothing_is_due_until_a_call_ends(byte_tokenizer: Tokenizer) -> None:
    machine = ToolMachine(byte_tokenizer, Calculator())
    for token in [byte_tokenizer.special("<|python_start|>"), *byte_tokenizer.encode("2*21")]:
        machine.read(token)
        assert machine.take_due() is None
    machine.read(byte_tokenizer.special("<|python_end|>"))
    due = [machine.take_due() for _ in range(5)]
    output = [byte_tokenizer.special("<|output_start|>"), *byte_tokenizer.encode("42")]
    assert due == [*output, byte_tokenizer.special("<|output_end|>"), None]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], ""),
        ([("text", "Hi"), ("text", " you")], "Hi you"),
        ([("text", "So "), ("python", "1+1"), ("python_output", "2"), ("text", "2.")], "So [1+1 = 2] 2."),
        ([("python", "1"), ("python", "+1"), ("python_output", "2")], "[1+1 = 2]"),
        ([("python", "1+1")], "[1+1]"),
        ([("python", "1+"), ("text", "x")], "[1+] x"),
        ([("python_output", "2"), ("python", "1")], "[= 2] [1]"),
    ],
)
def test_calls_are_written_in_brackets(parts: list[tuple[str, str]], text: str) -> None:
    pieces = [Part(kind, piece) for kind, piece in parts]
    assert "".join(written(pieces)) == text
    assert "".join(written(join_pieces(pieces))) == text
