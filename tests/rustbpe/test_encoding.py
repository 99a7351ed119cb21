from __future__ import annotations

import os
import random
import re
import threading
import time
from array import array
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import rustbpe
from nanochat.evaluation.tokenizer_quality import evaluation_texts
from nanochat.recipes import gpt4_pattern

PATTERN = gpt4_pattern(r"\p{N}{1,2}")
SPECIAL = {"<|bos|>": 5000, "<|user_start|>": 5001, "<|user_end|>": 5002, "é<": 5007}

# Strings that are compared with tiktoken. A hundred thousand take about ten seconds.
FUZZ = int(os.environ.get("RUSTBPE_FUZZ", "100000"))

TEXTS = [text.text for text in evaluation_texts().values()]
DOCUMENTS = [path.read_text() for path in sorted(Path(__file__).parents[2].glob("*.md"))]

# Where alternatives of the pattern, lengths of characters and neighbours in words meet.
PIECES = [
    *"aeiountrsgh'.,!-_ \n\t\r\0019٣½éſñßяж日한語😀",
    *(
        "  ",
        "\r\n",
        "'s",
        "'LL",
        "ing",
        "the ",
        " of",
        "tion",
        "\u0301",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u200d",
    ),
    *(
        "123456",
        "   \n  ",
        "aaaaaaaaaaaaaaaaaaaa",
        "-----------------",
        "\U0010ffff",
        "<|bos|>",
        "<|bos|",
        "é<|",
    ),
]


def random_text(generator: random.Random) -> str:
    kind = generator.randrange(8)
    if kind < 3:
        return "".join(generator.choices(PIECES, k=generator.randrange(24)))
    if kind < 5:
        text = generator.choice(TEXTS)
        start = generator.randrange(len(text))
        return text[start : start + generator.randrange(120)]
    if kind == 5:  # long words of few letters: many ways to join them
        return "".join(
            generator.choices(generator.choice(["ab", "ethn", "한국어", "0 1"]), k=generator.randrange(300))
        )
    if kind == 6:
        return "".join(chr(generator.randrange(0xD800)) for _ in range(generator.randrange(20)))
    return "".join(
        chr(generator.choice([generator.randrange(0x80), generator.randrange(0xE000, 0x110000)]))
        for _ in range(generator.randrange(20))
    )


@pytest.fixture(scope="module")
def tokenizer() -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    generator = random.Random(11)
    noise = ["aaaa " * 40, *(random_text(generator) for _ in range(1000))]
    tokenizer.train_from_iterator(TEXTS + DOCUMENTS + noise, 4096, PATTERN)
    assert tokenizer.vocab_size == 4096
    tokenizer.special_tokens = SPECIAL
    return tokenizer


@pytest.fixture(scope="module")
def reference(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    return reference_of(tokenizer)


def reference_of(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "reference",
        pat_str=tokenizer.get_pattern(),
        mergeable_ranks=dict(tokenizer.get_mergeable_ranks()),
        special_tokens=tokenizer.special_tokens,
    )


# --------------------------------------------------------------------------------------------------
# The ids of tiktoken


def test_random_and_adversarial_texts_get_the_ids_of_tiktoken(
    tokenizer: rustbpe.Tokenizer, reference: tiktoken.Encoding
) -> None:
    generator = random.Random(FUZZ)
    allowed = {"<|bos|>", "é<"}
    for _ in range(0, FUZZ, 1000):
        texts = [random_text(generator) for _ in range(1000)]
        for text, ids in zip(texts, tokenizer.encode_batch(texts, threads=2), strict=True):
            assert ids == reference.encode_ordinary(text), repr(text)
        for text in texts[::10]:
            expected = reference.encode(text, allowed_special=allowed, disallowed_special=())
            assert tokenizer.encode(text, allowed) == expected, repr(text)


def test_vocabularies_that_no_training_made_get_the_ids_of_tiktoken() -> None:
    # Spellings at random: several ways to split them, some out of reach, ids in any order with gaps.
    generator = random.Random(5)
    for _ in range(max(50, FUZZ // 1000)):
        alphabet = generator.choice(["ab", "abc", "aé"])
        tokens = {bytes([byte]) for byte in range(256)}
        tokens |= {
            "".join(generator.choices(alphabet, k=generator.randrange(2, 22))).encode()
            for _ in range(generator.randrange(60))
        }
        ids = generator.sample(range(2 * len(tokens)), len(tokens))
        tokenizer = rustbpe.Tokenizer.from_ranks(dict(zip(sorted(tokens), ids, strict=True)), r"\S+|\s+")
        reference = reference_of(tokenizer)
        for _ in range(20):
            text = "".join(generator.choices(alphabet + " ", k=generator.randrange(200)))
            assert tokenizer.encode(text) == reference.encode_ordinary(text), (sorted(tokens), text)


@pytest.mark.parametrize("letter", ["a", "b", "日", "!", "\n", "é"])
def test_long_words_get_the_ids_of_tiktoken(
    letter: str, tokenizer: rustbpe.Tokenizer, reference: tiktoken.Encoding
) -> None:
    for length in (15, 16, 17, 63, 64, 65, 127, 128, 129, 5000):
        text = letter * length
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


def test_the_time_of_a_word_is_not_the_square_of_its_length(tokenizer: rustbpe.Tokenizer) -> None:
    def seconds(length: int) -> float:
        text = "a" * length
        started = time.thread_time()
        tokenizer.encode(text)
        return time.thread_time() - started

    short = min(seconds(50_000) for _ in range(3))
    assert min(seconds(800_000) for _ in range(2)) < 100 * short  # squared, it would be 256 times


def test_halves_of_surrogate_pairs_are_encoded_as_tiktoken_does(
    tokenizer: rustbpe.Tokenizer, reference: tiktoken.Encoding
) -> None:
    for text in ("a\ud800b", "\udc00\ud800", "\ud83d\ude00", "\ud800"):
        expected = reference.encode_ordinary(text)
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode_batch([text]) == [expected]
        assert tokenizer.encode_to_numpy(text).tolist() == expected


# --------------------------------------------------------------------------------------------------
# Special tokens


def test_text_that_looks_like_a_special_token_is_text_unless_allowed(
    tokenizer: rustbpe.Tokenizer, reference: tiktoken.Encoding
) -> None:
    text = "<|bos|><|user_start|>hi<|user_end|> <|bos|"
    assert tokenizer.encode(text) == reference.encode_ordinary(text)
    assert tokenizer.encode(text, set()) == reference.encode_ordinary(text)
    assert tokenizer.encode(text, "all") == reference.encode(text, allowed_special="all")
    assert tokenizer.encode(text, allowed_special={"<|bos|>"})[0] == 5000
    assert 5001 not in tokenizer.encode(text, allowed_special=["<|bos|>"])
    assert tokenizer.decode(tokenizer.encode(text, "all")) == text


def test_unknown_names_and_taken_ids_are_refused(tokenizer: rustbpe.Tokenizer) -> None:
    with pytest.raises(ValueError, match=re.escape('"<|end|>" is no special token; there are ["<|bos|>"')):
        tokenizer.encode("text", {"<|end|>"})
    with pytest.raises(ValueError, match=re.escape("\"all\" or a set of names, got '<|bos|>'")):
        tokenizer.encode("text", "<|bos|>")  # type: ignore[arg-type]
    for tokens, complaint in (
        ({"<|bos|>": 97}, "has the id of the token b'a'"),
        ({"<|bos|>": 5000, "<|eos|>": 5000}, "has the id of"),
        ({"": 5000}, "has no name"),
    ):
        with pytest.raises(ValueError, match=complaint):
            tokenizer.special_tokens = tokens
    assert tokenizer.special_tokens == SPECIAL


def test_a_training_leaves_no_special_tokens_behind() -> None:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.special_tokens = {"<|bos|>": 256}
    assert tokenizer.encode("<|bos|>", "all") == [256]
    tokenizer.train_from_iterator(["aab aab"], 257)
    assert tokenizer.special_tokens == {}
    assert tokenizer.encode("aa") == [256]


# --------------------------------------------------------------------------------------------------
# Buffers


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_ids_are_written_into_a_buffer_with_bos_before_each_text(
    kind: type, tokenizer: rustbpe.Tokenizer
) -> None:
    out = np.full(10_000, 9, dtype=kind)
    texts = [TEXTS[0][:3000], "", "the end"]
    expected = [token for text in texts for token in (5000, *tokenizer.encode(text))]
    for threads in (1, 2, None):
        count = tokenizer.encode_into(texts, out[1:], bos=5000, threads=threads)
        assert count == len(expected)
        assert out[1 : 1 + count].tolist() == expected
        assert out[0] == out[1 + count] == 9
    assert tokenizer.encode_into("the end", out) == len(tokenizer.encode("the end"))
    array_of_numbers = array("I", bytes(40))
    assert tokenizer.encode_into("a", array_of_numbers) == 1  # type: ignore[arg-type]
    assert array_of_numbers[0] == 97
    assert tokenizer.encode_into([], out[:0]) == 0


def test_numpy_arrays_hold_the_same_ids(tokenizer: rustbpe.Tokenizer) -> None:
    texts = TEXTS[:2]
    expected = [token for text in texts for token in (7, *tokenizer.encode(text))]
    ids = tokenizer.encode_to_numpy(iter(texts), "uint16", bos=7)
    assert (ids.dtype, ids.tolist()) == (np.uint16, expected)
    assert tokenizer.encode_to_numpy("").tolist() == []
    assert tokenizer.encode_to_numpy("").dtype == np.uint32


def test_a_buffer_that_is_too_short_is_told_by_how_much_and_left_alone(tokenizer: rustbpe.Tokenizer) -> None:
    out = np.zeros(5, dtype=np.uint32)
    text = "x1" * 4
    with pytest.raises(ValueError, match="room for 5 ids, the texts have 8: 3 too few; nothing was written"):
        tokenizer.encode_into(text, out)
    assert not out.any()


def test_sixteen_bits_are_refused_for_ids_they_cannot_hold(tokenizer: rustbpe.Tokenizer) -> None:
    ranks = [*tokenizer.get_mergeable_ranks(), (b"qxqxq", 65_536)]
    large = rustbpe.Tokenizer.from_ranks(ranks, PATTERN)
    with pytest.raises(ValueError, match="16 bits hold ids up to 65535, but ids go up to 65536: use uint32"):
        large.encode_into("a", np.zeros(5, dtype=np.uint16))
    with pytest.raises(ValueError, match="use uint32"):
        large.encode_to_numpy("a", "uint16")
    with pytest.raises(ValueError, match="go up to 70000"):
        tokenizer.encode_into("a", np.zeros(5, dtype=np.uint16), bos=70_000)
    assert large.encode_to_numpy("qxqxq").tolist() == [65_536]


def test_what_is_no_buffer_for_ids_is_refused(tokenizer: rustbpe.Tokenizer) -> None:
    frozen = np.zeros(5, dtype=np.uint32)
    frozen.flags.writeable = False
    for out, complaint in (
        (np.zeros(5, dtype=np.int64), "not into one of the format"),
        (np.zeros(5, dtype=">u4"), "not into one of the format"),
        (np.zeros(10, dtype=np.uint32)[::2], "with gaps"),
        (frozen, "read-only"),
        ([0, 0], "list"),
    ):
        with pytest.raises(TypeError, match=complaint):
            tokenizer.encode_into("a", out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='"uint16" or "uint32", got "int64"'):
        tokenizer.encode_to_numpy("a", "int64")  # type: ignore[arg-type]


def test_texts_that_are_none_are_refused_by_number(tokenizer: rustbpe.Tokenizer) -> None:
    with pytest.raises(TypeError, match=r"text 1 \(from 0\) is not a string but <class 'int'>"):
        tokenizer.encode_batch(["a", 2])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="several strings, not one"):
        tokenizer.encode_batch("text")
    with pytest.raises(ValueError, match="threads must be at least 1"):
        tokenizer.encode_batch(["a"], threads=0)


# --------------------------------------------------------------------------------------------------
# Decoding


def test_decoding_gives_the_text_back(tokenizer: rustbpe.Tokenizer) -> None:
    generator = random.Random(2)
    for _ in range(500):
        text = random_text(generator)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint32)) == text.encode()


def test_ids_that_end_inside_a_character_decode_with_replacement(tokenizer: rustbpe.Tokenizer) -> None:
    assert tokenizer.decode([97, 0xE2, 0x82, 98]) == "a\ufffdb"
    assert tokenizer.decode([97, 0xE2, 0x82, 98], errors="ignore") == "ab"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([0xFF], errors="strict")
    assert tokenizer.decode_bytes([0xE2, 5000]) == b"\xe2<|bos|>"


@pytest.mark.parametrize("unknown", [4096, 5003, -1, 2**32, 2**70])
def test_an_unknown_id_is_named(unknown: int, tokenizer: rustbpe.Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"token id {unknown} is neither in the vocabulary of 4096 tokens"):
        tokenizer.decode([97, unknown])
    with pytest.raises(TypeError):
        tokenizer.decode(["a"])  # type: ignore[list-item]


# --------------------------------------------------------------------------------------------------
# Vocabularies from elsewhere, and threads


def test_ranks_that_make_no_vocabulary_are_refused() -> None:
    bytes_alone = [(bytes([byte]), byte) for byte in range(256)]
    for ranks, complaint in (
        (bytes_alone[1:], "the byte 0x00 is no token"),
        ([*bytes_alone, (b"ab", 256), (b"ab", 257)], "tokens 256 and 257 are both spelled b'ab'"),
        ([*bytes_alone, (b"ab", 97)], "id 97 is that of two tokens"),
        ([*bytes_alone, (b"", 256)], "token 256 is empty"),
    ):
        with pytest.raises(ValueError, match=complaint):
            rustbpe.Tokenizer.from_ranks(ranks)
    with pytest.raises(ValueError, match="not a regular expression"):
        rustbpe.Tokenizer.from_ranks(bytes_alone, "(")
    assert rustbpe.Tokenizer.from_ranks(bytes_alone).get_pattern() == rustbpe.GPT4_PATTERN


def test_threads_may_share_a_tokenizer(tokenizer: rustbpe.Tokenizer) -> None:
    expected = tokenizer.encode_batch(TEXTS, threads=1)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            if [tokenizer.encode(text) for text in TEXTS] != expected:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
