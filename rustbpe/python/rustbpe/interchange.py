"""Vocabularies in the formats of others: tiktoken's rank files and Hugging Face's tokenizer.json.

Both ways the same text gives the same ids. What rustbpe has no word for is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rustbpe._rustbpe import GPT4_PATTERN, Tokenizer

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Patterns that leave no character of any text outside their matches: GPT-2's, GPT-4's as rustbpe has
# it and as tiktoken's cl100k_base was published before, Llama 3's, Qwen's, GPT-4o's.
_NEW_LINES_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4O_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_GPT4O_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_GPT4O_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WITHOUT_GAPS = {
    _GPT2_PATTERN,
    GPT4_PATTERN,
    GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}{1,2}"),
    GPT4_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_NEW_LINES_AND_SPACES}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_NEW_LINES_AND_SPACES}",
    rf"{_GPT4O_UPPER}{_CONTRACTIONS}?|{_GPT4O_LOWER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_GPT4O_REST}",
}


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


# --------------------------------------------------------------------------------------------------
# tiktoken


def to_tiktoken(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """A line for each token: its bytes in base64, a space, its id."""
    lines = (
        f"{base64.b64encode(token).decode()} {token_id}\n"
        for token, token_id in tokenizer.get_mergeable_ranks()
    )
    _write(path, "".join(lines))


def from_tiktoken(
    path: str | os.PathLike[str], pattern: str, special_tokens: Mapping[str, int] | None = None
) -> Tokenizer:
    """Raises OSError, or ValueError naming the file, and the line where it is one."""
    ranks: list[tuple[bytes, int]] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, token_id = line.split(b" ")
            ranks.append((base64.b64decode(token, validate=True), _id(int(token_id))))
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"{path}: line {number} is not a token in base64 and its id ({error}): {line[:40]!r}"
            ) from error
    return _tokenizer(path, ranks, pattern, special_tokens)


# --------------------------------------------------------------------------------------------------
# Hugging Face


def to_huggingface(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """A byte-level BPE model, which gives the ids of encode(text, allowed_special="all").

    Raises ValueError for a special token whose name would be taken for an ordinary token there.
    """
    tokens = {token_id: _spelled(token) for token, token_id in tokenizer.get_mergeable_ranks()}
    vocabulary = {token: token_id for token_id, token in tokens.items()}
    for name, token_id in tokenizer.special_tokens.items():
        if name in vocabulary or (not name.isascii() and all(letter in _BYTES for letter in name)):
            raise ValueError(
                f"the special token {name!r} is spelled like an ordinary one in a tokenizer.json"
            )
        # An added token keeps its id only if the vocabulary has it too.
        vocabulary[name] = token_id
    added = [
        {
            "id": token_id,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, token_id in tokenizer.special_tokens.items()
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                # Inverted and removed: what the pattern matches is a word, what it does not is nothing.
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenizer.get_pattern()},
                    "behavior": "Removed",
                    "invert": True,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A word that is a token is that token, also where no merge leads to it.
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [[tokens[left], tokens[right]] for left, right, _ in tokenizer.get_merges()],
        },
    }
    _write(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def from_huggingface(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer whose encode(text, allowed_special="all") gives the ids that Hugging Face's gives
    with add_special_tokens=False.

    Raises OSError, or ValueError naming the file and the part that rustbpe has no word for.
    """
    try:
        document = json.loads(Path(path).read_bytes())
        model = document["model"]
        pattern = _pattern(path, document.get("pre_tokenizer"))
        _require_plain(path, document, model)
        vocabulary: dict[str, int] = model["vocab"]
        special_tokens = _special_tokens(path, document.get("added_tokens") or [], vocabulary)
        ranks = [
            (_bytes(path, token), _id(token_id))
            for token, token_id in vocabulary.items()
            if token not in special_tokens
        ]
        merges = [_pair(pair) for pair in model["merges"]]
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not a tokenizer.json of a BPE model ({error!r})") from error
    tokenizer = _tokenizer(path, ranks, pattern, special_tokens)
    _require_same_merges(path, tokenizer, vocabulary, merges, bool(model.get("ignore_merges")))
    return tokenizer


def _require_plain(path: object, document: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Everything that changes ids must be absent. Truncation, padding and post-processors come after
    them, and a decoder only turns them back."""
    if model.get("type", "BPE") != "BPE":
        raise _refused(path, f"a model of type {model['type']}", "byte-level BPE models only")
    if document.get("normalizer") is not None:
        kind = document["normalizer"].get("type")
        raise _refused(path, f"a normalizer ({kind})", "text is encoded as it is")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _refused(path, f"{name} {model[name]!r}", "it must be absent")


def _special_tokens(
    path: object, added: list[Mapping[str, Any]], vocabulary: Mapping[str, int]
) -> dict[str, int]:
    special_tokens: dict[str, int] = {}
    for token in added:
        name, token_id = token["content"], _id(token["id"])
        for manner in ("single_word", "lstrip", "rstrip"):
            if token.get(manner):
                raise _refused(path, f"{manner} of the added token {name!r}", "names match as they are")
        # What tokenizers 0.23 does: an id of the vocabulary, or the next one, whatever the file says.
        given = vocabulary.get(name, max([len(vocabulary), *(used + 1 for used in special_tokens.values())]))
        if given != token_id:
            raise ValueError(f"{path}: gives the added token {name!r} the id {token_id}, but it has {given}")
        special_tokens[name] = token_id
    return special_tokens


def _pattern(path: object, pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The split pattern of a ByteLevel pre-tokenizer, alone or behind one Split."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1]["type"] != "ByteLevel" or len(steps) > 2:
        kinds = ", ".join(step["type"] for step in steps) or "none"
        raise _refused(path, f"the pre-tokenizer {kinds}", "ByteLevel, alone or behind one Split")
    if steps[-1].get("add_prefix_space", True):
        raise _refused(path, "add_prefix_space", "text is encoded as it is")
    byte_level_splits = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return _GPT2_PATTERN if byte_level_splits else r"[\s\S]+"
    split = steps[0]
    if split["type"] != "Split" or byte_level_splits:
        what = (
            "two splits, one in the other"
            if split["type"] == "Split"
            else f"the pre-tokenizer {split['type']}"
        )
        raise _refused(path, what, "ByteLevel, alone or behind one Split")
    pattern = split["pattern"].get("Regex")
    if pattern is None:
        raise _refused(path, "a Split by a string", "by a regular expression only")
    manner = (split["behavior"], bool(split.get("invert")))
    if manner == ("Removed", True):
        return pattern
    if manner == ("Isolated", False):
        # Here text between the matches is a word too.
        return pattern if pattern in _WITHOUT_GAPS else rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    raise _refused(
        path, f"a Split with behavior {manner[0]}, invert {manner[1]}", "Isolated, or Removed inverted"
    )


def _require_same_merges(
    path: object,
    tokenizer: Tokenizer,
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, str]],
    whole_words_first: bool,
) -> None:
    """rustbpe joins by the ids of the joined tokens; the file's own order must come to the same.

    A file may list more pairs than those that ever meet.
    """
    pairs: set[tuple[int, int]] = set()
    last = -1
    for left, right in merges:
        missing = [token for token in (left, right, left + right) if token not in vocabulary]
        if missing:
            raise ValueError(f"{path}: the merge {left} {right} names {missing[0]!r}, which is no token")
        joined = vocabulary[left + right]
        if joined < last:
            raise _refused(
                path, f"the merge {left} {right} after one of a higher id", "merges in order of ids"
            )
        last = joined
        pairs.add((vocabulary[left], vocabulary[right]))
    spelled = {token_id: token for token, token_id in vocabulary.items()}
    ours = tokenizer.get_merges()
    for left_id, right_id, joined in ours:
        if (left_id, right_id) not in pairs:
            raise _refused(
                path,
                f"the token {spelled[joined]!r} without the merge {spelled[left_id]} {spelled[right_id]}",
                "neighbours that spell a token join",
            )
    if not whole_words_first:
        reached = {joined for _, _, joined in ours}
        for token, token_id in tokenizer.get_mergeable_ranks():
            if len(token) > 1 and token_id not in reached:
                raise _refused(
                    path,
                    f"the token {spelled[token_id]!r}, to which no merge leads, without ignore_merges",
                    "a word that is a token is that token",
                )


def _pair(merge: Any) -> tuple[str, str]:
    if isinstance(merge, str):  # older files have a pair as one string with a space in it
        left, _, right = merge.partition(" ")
        return left, right
    return merge[0], merge[1]


def _spelled(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _bytes(path: object, token: str) -> bytes:
    try:
        return bytes(_BYTES[letter] for letter in token)
    except KeyError as error:
        raise ValueError(
            f"{path}: the token {token!r} is not spelled in letters for bytes: {error} is none of them"
        ) from error


# --------------------------------------------------------------------------------------------------


def _tokenizer(
    path: object,
    ranks: list[tuple[bytes, int]],
    pattern: str,
    special_tokens: Mapping[str, int] | None,
) -> Tokenizer:
    try:
        return Tokenizer.from_ranks(ranks, pattern, dict(special_tokens or {}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _id(token_id: int) -> int:
    if not 0 <= token_id < 2**32:
        raise ValueError(f"{token_id} is no id: ids are from 0 to 2^32 - 1")
    return token_id


def _refused(path: object, what: str, instead: str) -> ValueError:
    return ValueError(f"{path}: has {what}, which rustbpe cannot express ({instead})")


def _write(path: str | os.PathLike[str], text: str) -> None:
    """Write a file that is whole or not there."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
