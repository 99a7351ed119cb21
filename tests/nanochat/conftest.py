"""Small stand-ins that tests of inference and evaluation share (imported only by those that ask)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nanochat.recipes import SPECIAL_TOKENS, gpt4_pattern

if TYPE_CHECKING:
    from standins.scripted_model import ScriptedModel

    from nanochat.model.gpt import GPT
    from nanochat.store import ObjectStore
    from nanochat.tokenizer import Tokenizer

MERGES = (b"th", b"he", b" t", b" \xf0", b"\x9f\x98", b"12")


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Every byte a token, and a few merges, among them two that cut an emoji in pieces."""
    from nanochat.tokenizer import Tokenizer

    ranks = [bytes([byte]) for byte in range(256)] + list(MERGES)
    return Tokenizer.from_json(
        {
            "schema": "nanochat.tokenizer",
            "version": 1,
            "pattern": gpt4_pattern(r"\p{N}"),
            "ranks": [base64.b64encode(rank).decode() for rank in ranks],
            "special_tokens": {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)},
            "provenance": {},
        }
    )


@pytest.fixture(scope="session")
def script(byte_tokenizer: Tokenizer) -> Callable[..., ScriptedModel]:
    """script({prompt ids: answer ids}, context=64) -> a model that says those answers."""
    from standins.scripted_model import ScriptedModel

    def make(answers: Mapping[tuple[int, ...], Sequence[int]], context: int = 64) -> ScriptedModel:
        end = byte_tokenizer.special("<|assistant_end|>")
        return ScriptedModel(byte_tokenizer.vocab_size, context, answers, end)

    return make


@pytest.fixture(scope="session")
def spell(byte_tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text with special tokens written out ("<|python_start|>1+1<|python_end|>") to ids."""

    def ids(text: str) -> list[int]:
        found = [(text.find(name), name) for name in SPECIAL_TOKENS if name in text]
        if not found:
            return byte_tokenizer.encode(text)
        at, name = min(found)
        rest = ids(text[at + len(name) :])
        return [*byte_tokenizer.encode(text[:at]), byte_tokenizer.special(name), *rest]

    return ids


@pytest.fixture(scope="session")
def trained_model(byte_tokenizer: Tokenizer, spell: Callable[[str], list[int]]) -> GPT:
    """A tiny model that knows four texts by heart."""
    from standins.trained_model import train

    return train(byte_tokenizer, spell)


@pytest.fixture
def chat_store(tmp_path: Path, trained_model: GPT, byte_tokenizer: Tokenizer) -> ObjectStore:
    """A store in which model `quick` has its tokenizer, `base` and `sft`, but no `midtrain`."""
    from standins.trained_model import fill_store

    return fill_store(tmp_path, trained_model, byte_tokenizer)


@pytest.fixture(scope="module")
def module_chat_store(
    tmp_path_factory: pytest.TempPathFactory, trained_model: GPT, byte_tokenizer: Tokenizer
) -> ObjectStore:
    """The same for all tests of a module, which only read it."""
    from standins.trained_model import fill_store

    return fill_store(tmp_path_factory.mktemp("chat"), trained_model, byte_tokenizer)
