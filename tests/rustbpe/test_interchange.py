from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rustbpe
from nanochat.evaluation.tokenizer_quality import evaluation_texts
from nanochat.recipes import gpt4_pattern

PATTERN = gpt4_pattern(r"\p{N}{1,2}")
SPECIAL = {"<|bos|>": 2000, "<|user_start|>": 2001}
TEXTS = [text.text for text in evaluation_texts().values()]
PIECES = [
    *"aeinrst ,.'!\n\r\t0129éſяж日한😀\0\x7f\x80\xad",
    "  ",
    "<|bos|>",
    "\u0301",
    "the ",
    "ing",
    "aaaaaaaaaa",
]


def _texts(count: int) -> list[str]:
    generator = random.Random(4)
    return TEXTS + ["".join(generator.choices(PIECES, k=generator.randrange(60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(TEXTS, 1500, PATTERN)
    tokenizer.special_tokens = SPECIAL
    return tokenizer


@pytest.fixture
def exported(tokenizer: rustbpe.Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    tokenizer.to_huggingface(path)
    return path


def _imported(rank_pairs: list[tuple[str, int]], pattern: str = r"\S+|\s+") -> rustbpe.Tokenizer:
    ranks = [(bytes([byte]), byte) for byte in range(256)]
    return rustbpe.Tokenizer.from_ranks(
        [*ranks, *((token.encode(), rank) for token, rank in rank_pairs)], pattern
    )


def _same(one: rustbpe.Tokenizer, other: rustbpe.Tokenizer) -> bool:
    return (one.get_mergeable_ranks(), one.get_pattern(), one.special_tokens) == (
        other.get_mergeable_ranks(),
        other.get_pattern(),
        other.special_tokens,
    )


# --------------------------------------------------------------------------------------------------
# tiktoken


def test_a_tiktoken_file_is_written_and_read(tokenizer: rustbpe.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "ours.tiktoken"
    tokenizer.to_tiktoken(path)
    lines = path.read_text().splitlines()
    assert len(lines) == 1500
    assert lines[97] == "YQ== 97"
    assert _same(rustbpe.Tokenizer.from_tiktoken(path, PATTERN, SPECIAL), tokenizer)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours.tiktoken"]


def test_tiktoken_reads_it_and_gives_the_same_ids(tokenizer: rustbpe.Tokenizer, tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path = tmp_path / "ours.tiktoken"
    tokenizer.to_tiktoken(path)
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(path))
    reference = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL)
    for text in _texts(2000):
        assert tokenizer.encode(text, "all") == reference.encode(text, allowed_special="all")


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.tiktoken"
    good = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    for line, complaint in (
        ("YWI=", r"bad\.tiktoken: line 257 is not a token"),
        ("Y!I= 256", "line 257 is not a token"),
        ("YWI= two", "line 257 is not a token"),
        ("YWI= -1", "line 257 is not a token .*ids are from 0"),
        ("YQ== 256", r"bad\.tiktoken: tokens 97 and 256 are both spelled b'a'"),
    ):
        path.write_text(good + line)
        with pytest.raises(ValueError, match=complaint):
            rustbpe.Tokenizer.from_tiktoken(path, PATTERN)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rustbpe.Tokenizer.from_tiktoken(tmp_path / "nowhere", PATTERN)


# --------------------------------------------------------------------------------------------------
# Hugging Face


def test_a_tokenizer_json_is_written_and_read(tokenizer: rustbpe.Tokenizer, exported: Path) -> None:
    assert _same(rustbpe.Tokenizer.from_huggingface(exported), tokenizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda tokenizer: tokenizer,
        lambda tokenizer: _with_pattern(tokenizer, r"[a-z]+(?=[ ,])|\d"),
        # A token out of reach, one of lower rank than its parts, one of several splits, a gap.
        lambda _: _imported(
            [("xyz", 300), ("abcd", 256), ("ab", 257), ("cd", 258), ("bcd", 259), ("aab", 270)]
        ),
    ],
    ids=["learned", "a pattern with gaps", "imported"],
)
def test_tokenizers_reads_it_and_gives_the_same_ids(
    make: Callable[[rustbpe.Tokenizer], rustbpe.Tokenizer], tokenizer: rustbpe.Tokenizer, tmp_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = make(tokenizer)
    made.to_huggingface(tmp_path / "tokenizer.json")
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    generator = random.Random(9)
    few_letters = ["".join(generator.choices("abcdxyz ", k=30)) for _ in range(500)] + ["xyz", "abcd"]
    for text in _texts(2000) + few_letters:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert made.encode(text, "all") == ids, repr(text)
        if made is tokenizer:
            assert reference.decode(ids, skip_special_tokens=False) == made.decode(ids)


def _with_pattern(tokenizer: rustbpe.Tokenizer, pattern: str) -> rustbpe.Tokenizer:
    return rustbpe.Tokenizer.from_ranks(tokenizer.get_mergeable_ranks(), pattern, tokenizer.special_tokens)


def test_text_between_matches_is_a_word_where_the_file_says_isolated(
    tokenizer: rustbpe.Tokenizer, exported: Path
) -> None:
    document = json.loads(exported.read_bytes())
    split = document["pre_tokenizer"]["pretokenizers"][0]
    split.update(behavior="Isolated", invert=False)
    exported.write_text(json.dumps(document))
    # GPT-4's pattern leaves no gaps, so it stays as it is.
    assert rustbpe.Tokenizer.from_huggingface(exported).get_pattern() == PATTERN
    split["pattern"]["Regex"] = r"[a-z]+(?=[ ,])|\d"
    exported.write_text(json.dumps(document))
    ours = rustbpe.Tokenizer.from_huggingface(exported)
    assert ours.decode(ours.encode("ab, cd 1!?")) == "ab, cd 1!?"
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(exported))
    for text in _texts(1000):
        assert ours.encode(text, "all") == reference.encode(text, add_special_tokens=False).ids, repr(text)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *folders, name = path.split("/")

    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for folder in folders:
            target = target[int(folder) if folder.isdigit() else folder]
        target[name] = value

    return change


def _swap_merges(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _drop_a_merge(document: dict[str, Any]) -> None:
    del document["model"]["merges"][3]


def _out_of_reach(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["qxqx"] = 1999
    document["model"]["ignore_merges"] = False


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_set("normalizer", {"type": "NFC"}), r"a normalizer \(NFC\)"),
        (_set("model/type", "Unigram"), "a model of type Unigram"),
        (_set("model/dropout", 0.1), "dropout 0.1"),
        (_set("model/unk_token", "<unk>"), "unk_token '<unk>'"),
        (_set("model/byte_fallback", True), "byte_fallback True"),
        (_set("model/continuing_subword_prefix", "##"), "continuing_subword_prefix '##'"),
        (_set("model/end_of_word_suffix", "</w>"), "end_of_word_suffix '</w>'"),
        (_set("added_tokens/0/id", 2005), "gives the added token '<|bos|>' the id 2005, but it has 2000"),
        (_set("added_tokens/0/lstrip", True), "lstrip of the added token '<|bos|>'"),
        (_set("pre_tokenizer", None), "the pre-tokenizer none"),
        (_set("pre_tokenizer", {"type": "Whitespace"}), "the pre-tokenizer Whitespace"),
        (_set("pre_tokenizer/pretokenizers/0/type", "Digits"), "the pre-tokenizer Digits"),
        (_set("pre_tokenizer/pretokenizers/0/behavior", "MergedWithNext"), "behavior MergedWithNext"),
        (_set("pre_tokenizer/pretokenizers/0/pattern", {"String": " "}), "a Split by a string"),
        (_set("pre_tokenizer/pretokenizers/1/add_prefix_space", True), "add_prefix_space"),
        (_set("pre_tokenizer/pretokenizers/1/use_regex", True), "two splits"),
        (_swap_merges, "the merge .* after one of a higher id"),
        (_drop_a_merge, "the token '.*' without the merge"),
        (_out_of_reach, "the token 'qxqx', to which no merge leads, without ignore_merges"),
        (_set("model/vocab/a b", 1800), "the token 'a b' is not spelled in letters for bytes"),
        (_set("model", {}), "is not a tokenizer.json of a BPE model"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    change: Callable[[dict[str, Any]], None], complaint: str, exported: Path
) -> None:
    document = json.loads(exported.read_bytes())
    change(document)
    exported.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=complaint) as error:
        rustbpe.Tokenizer.from_huggingface(exported)
    assert "tokenizer.json: " in str(error.value)


def test_a_special_token_spelled_like_an_ordinary_one_is_not_exported(
    tokenizer: rustbpe.Tokenizer, tmp_path: Path
) -> None:
    ranks = tokenizer.get_mergeable_ranks()
    ordinary = next(token.decode() for token, _ in ranks if len(token) > 1 and token.isalpha())
    for name in (ordinary, "Ã©"):  # the second is how "é" is spelled in letters for bytes
        ours = rustbpe.Tokenizer.from_ranks(ranks, PATTERN, {name: 2000})
        with pytest.raises(ValueError, match=f"the special token '{name}' is spelled like an ordinary one"):
            ours.to_huggingface(tmp_path / "tokenizer.json")


def test_gpt2s_own_kind_of_file_is_read(exported: Path) -> None:
    # ByteLevel alone splits by GPT-2's pattern; merges are strings.
    document = json.loads(exported.read_bytes())
    document["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = document["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    del model["type"], model["ignore_merges"]
    exported.write_text(json.dumps(document))
    ours = rustbpe.Tokenizer.from_huggingface(exported)
    assert ours.get_pattern().startswith("'s|'t|'re")
    assert ours.special_tokens == SPECIAL
    assert ours.vocab_size == 1500
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(exported))
    for text in _texts(1000):
        assert ours.encode(text, "all") == reference.encode(text, add_special_tokens=False).ids, repr(text)


def test_pairs_that_never_meet_may_be_listed_too(tokenizer: rustbpe.Tokenizer, exported: Path) -> None:
    # Converters of rank files list every two tokens that spell a third.
    document = json.loads(exported.read_bytes())
    model = document["model"]
    every = [
        (vocabulary_id, [token[:cut], token[cut:]])
        for token, vocabulary_id in model["vocab"].items()
        for cut in range(1, len(token))
        if token[:cut] in model["vocab"] and token[cut:] in model["vocab"]
    ]
    assert len(every) > len(model["merges"])
    changed = copy.deepcopy(document)
    changed["model"]["merges"] = [pair for _, pair in sorted(every)]
    exported.write_text(json.dumps(changed))
    assert _same(rustbpe.Tokenizer.from_huggingface(exported), tokenizer)
