from __future__ import annotations

import base64
import copy
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

import rustbpe
from nanochat.evaluation.tokenizer_quality import ROUND_TRIPS, evaluation_texts
from nanochat.recipes import SPECIAL_TOKENS, gpt4_pattern
from nanochat.store.documents import DocumentError
from nanochat.tokenizer import Tokenizer

PATTERN = gpt4_pattern(r"\p{N}{1,2}")
BYTES = [bytes([byte]) for byte in range(256)]


def _trained() -> Tokenizer:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator([text.text for text in evaluation_texts().values()], 700, PATTERN)
    ranks = [token for token, _ in trainer.get_mergeable_ranks()]
    return Tokenizer(pattern=PATTERN, ranks=ranks, provenance={"source": "a test"})


TRAINED = _trained()


@pytest.fixture
def document() -> dict[str, Any]:
    return copy.deepcopy(TRAINED.to_json())


# --------------------------------------------------------------------------------------------------
# Text


def test_the_special_tokens_are_the_last_nine_ids_in_the_order_of_the_recipes() -> None:
    assert TRAINED.vocab_size == 709
    assert [TRAINED.special(name) for name in SPECIAL_TOKENS] == list(range(700, 709))
    assert TRAINED.bos == 700
    with pytest.raises(ValueError, match=r"no special token '<\|bas\|>'"):
        TRAINED.special("<|bas|>")


@pytest.mark.parametrize("text", ROUND_TRIPS, ids=lambda text: f"{text!r:.25}")
def test_text_comes_back_as_it_was(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(st.text())
def test_any_text_comes_back_without_special_tokens_on_the_way(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert all(token < 700 for token in ids)


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", " ", "bos", "user_start"])).map("".join))
def test_text_that_looks_like_special_tokens_stays_text(text: str) -> None:
    ids = TRAINED.encode(text)
    assert all(token < 700 for token in ids)
    assert TRAINED.decode(ids) == text


@given(st.text(alphabet=st.sampled_from(" \n\ta1é가'!<|>bos"), max_size=60))
def test_ids_are_those_of_tiktoken_and_of_rustbpe(text: str) -> None:
    reference = tiktoken.Encoding(
        "reference",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(TRAINED.ranks)},
        special_tokens={},
    )
    assert TRAINED.encode(text) == reference.encode_ordinary(text)


def test_half_a_surrogate_pair_is_encoded_as_the_replacement_character() -> None:
    assert TRAINED.decode(TRAINED.encode("a\ud800b")) == "a\ufffdb"


def test_white_space_beyond_what_tiktoken_can_split_is_encoded() -> None:
    text = "a" + " " * 1_500_000 + "\n" * 1_200_000 + "b"
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_runs_of_white_space_just_below_that_take_no_longer_than_other_text() -> None:
    text = (" " * 99_999 + "x") * 20
    started = time.perf_counter()
    assert TRAINED.decode(TRAINED.encode(text)) == text
    assert time.perf_counter() - started < 10  # 20 s a run where every position is tried


def test_a_batch_gives_what_single_texts_give_in_order() -> None:
    texts = [f"text number {number}, " * number for number in range(50)]
    assert TRAINED.encode_batch(texts, threads=3) == [TRAINED.encode(text) for text in texts]
    assert TRAINED.encode_batch([]) == []


def test_decoding_takes_numpy_ids_names_specials_and_replaces_broken_utf8() -> None:
    assert TRAINED.decode(np.array(TRAINED.encode("né"))) == "né"
    assert TRAINED.decode([TRAINED.bos, 65]) == "<|bos|>A"
    assert TRAINED.decode([0xC3]) == "\ufffd"
    assert TRAINED.decode_bytes([0xC3]) == b"\xc3"


@pytest.mark.parametrize("token", [-1, 709, 10**12])
def test_an_unknown_id_is_refused_by_number(token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} is not in the vocabulary of 709"):
        TRAINED.decode([65, token])


def test_token_bytes_are_the_lengths_of_ordinary_tokens_and_nought_for_specials() -> None:
    lengths = TRAINED.token_bytes()
    assert lengths.shape == (709,)
    assert lengths.dtype == np.int64
    assert lengths[-9:].tolist() == [0] * 9
    text = "Words, 한국어 and 12345."
    assert lengths[TRAINED.encode(text)].sum() == len(text.encode())
    assert all(lengths[token] == len(TRAINED.decode_bytes([token])) for token in range(700))


def test_a_tokenizer_can_be_sent_to_another_process() -> None:
    copied = pickle.loads(pickle.dumps(TRAINED))
    assert copied.encode("Sent away.") == TRAINED.encode("Sent away.")


# --------------------------------------------------------------------------------------------------
# Files


def test_a_saved_tokenizer_loads_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.to_json() == TRAINED.to_json()
    assert loaded.encode("The same ids?") == TRAINED.encode("The same ids?")
    assert loaded.provenance == {"source": "a test"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def test_equal_tokenizers_give_equal_files(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "a.json")
    Tokenizer.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_file_is_the_documented_json(document: dict[str, Any]) -> None:
    assert document["schema"] == "nanochat.tokenizer"
    assert document["version"] == 1
    assert document["pattern"] == PATTERN
    assert base64.b64decode(document["ranks"][65]) == b"A"
    assert document["special_tokens"]["<|output_end|>"] == 708


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        TRAINED.save(tmp_path / "tokenizer.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def _spoil(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**document, **changes}


def test_a_newer_schema_is_refused_by_number(document: dict[str, Any]) -> None:
    with pytest.raises(
        DocumentError, match=r"schema version 2 of nanochat\.tokenizer; this code knows up to 1"
    ):
        Tokenizer.from_json(_spoil(document, version=2))


def test_another_schema_and_missing_fields_are_named(document: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match=r"not a nanochat\.tokenizer document"):
        Tokenizer.from_json(_spoil(document, schema="nanochat.receipt"))
    del document["pattern"]
    with pytest.raises(DocumentError, match="pattern"):
        Tokenizer.from_json(document)


def test_duplicate_ranks_are_named(document: dict[str, Any]) -> None:
    document["ranks"][300] = document["ranks"][65]
    with pytest.raises(DocumentError, match=r"token 300 \(b'A'\) is the same as token 65"):
        Tokenizer.from_json(document)


def test_missing_bytes_are_named(document: dict[str, Any]) -> None:
    ranks = [rank for rank in document["ranks"] if base64.b64decode(rank) not in (b"A", b"\xff")]
    special_tokens = {name: token - 2 for name, token in document["special_tokens"].items()}
    with pytest.raises(DocumentError, match=r"2 of the 256 bytes are no token \(0x41, 0xff\)"):
        Tokenizer.from_json(_spoil(document, ranks=ranks, special_tokens=special_tokens))


def test_ranks_that_are_no_base64_or_empty_are_named(document: dict[str, Any]) -> None:
    document["ranks"][400] = "é"
    with pytest.raises(DocumentError, match="token 400 is not base64"):
        Tokenizer.from_json(document)
    document["ranks"][400] = ""
    with pytest.raises(DocumentError, match="token 400 is empty"):
        Tokenizer.from_json(document)


def test_special_tokens_with_other_ids_missing_or_unknown_are_named(document: dict[str, Any]) -> None:
    special_tokens = dict(document["special_tokens"])
    del special_tokens["<|user_end|>"]
    special_tokens["<|bos|>"] = 5
    special_tokens["<|pad|>"] = 709
    with pytest.raises(DocumentError) as error:
        Tokenizer.from_json(_spoil(document, special_tokens=special_tokens))
    assert "<|user_end|> is missing" in str(error.value)
    assert "<|bos|> has id 5, but it is 700" in str(error.value)
    assert "unknown <|pad|>" in str(error.value)


def test_a_pattern_that_is_no_regular_expression_is_shown(document: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match="pattern: not a regular expression"):
        Tokenizer.from_json(_spoil(document, pattern="("))


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04\x95pickled", b"[]", b"null"])
def test_a_file_of_another_kind_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_torn_file_is_refused_wherever_it_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    whole = json.dumps(TRAINED.to_json()).encode()
    for length in range(0, len(whole) - 1, 997):
        path.write_bytes(whole[:length])
        with pytest.raises(DocumentError):
            Tokenizer.load(path)


def test_ranks_given_in_code_are_checked_too() -> None:
    with pytest.raises(ValueError, match="255 of the 256 bytes are no token"):
        Tokenizer(pattern=PATTERN, ranks=[b"a"])
    with pytest.raises(ValueError, match="is the same as token 97"):
        Tokenizer(pattern=PATTERN, ranks=[*BYTES, b"a"])
