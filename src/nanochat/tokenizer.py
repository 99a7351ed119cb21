"""The tokenizer: text to token ids and back.

A vocabulary is the ranks that `rustbpe` learned, id 0 first, and after them the nine special tokens.
Encoding is done by tiktoken's core with these ranks. Special tokens come from rendering a conversation
alone: what a user types is always encoded as ordinary text, even where it is spelled like one.

It is kept as JSON (`tokenizer.json`), never as a pickle::

    {"schema": "nanochat.tokenizer", "version": 1, "pattern": "…", "ranks": ["AA==", …],
     "special_tokens": {"<|bos|>": 65527, …}, "provenance": {…}}

`ranks` are the tokens' bytes in base64, in id order; `provenance` says what it was trained on; at the end
stands the digest of the rest (`document_sha256`).
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import tiktoken
from pydantic import Field

from nanochat import rendering
from nanochat.data.conversations import Conversation
from nanochat.recipes import SPECIAL_TOKENS
from nanochat.store.documents import Document, DocumentError

if TYPE_CHECKING:
    import numpy as np

# tiktoken's regular-expression engine overflows its stack on about a million white-space characters in a
# row. Longer runs than this are encoded in pieces; no other text is long enough to be looked at.
_MAX_WHITESPACE_RUN = 100_000
# The look-behind makes it try once a run: without it, a run that is just too short costs its square.
_LONG_WHITESPACE = re.compile(rf"(?<!\s)\s{{{_MAX_WHITESPACE_RUN},}}")


class TokenizerDocument(Document):
    """tokenizer.json, before its content is looked at."""

    schema_name: ClassVar[str] = "nanochat.tokenizer"

    pattern: str
    ranks: tuple[str, ...]
    special_tokens: dict[str, int]
    provenance: dict[str, Any] = Field(default_factory=dict)


class Tokenizer:
    """A vocabulary that encodes, decodes and renders conversations."""

    def __init__(
        self, *, pattern: str, ranks: Sequence[bytes], provenance: Mapping[str, Any] | None = None
    ) -> None:
        """ranks: every token's bytes in id order; the special tokens get the ids after them.

        Raises ValueError when the ranks make no vocabulary or the pattern is no regular expression.
        """
        problems = _rank_problems(ranks)
        if problems:
            raise ValueError("; ".join(problems))
        self.pattern = pattern
        self.ranks = tuple(ranks)
        self.special_tokens = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
        self.provenance = dict(provenance or {})
        try:
            self._encoding = tiktoken.Encoding(
                "nanochat",
                pat_str=pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
                special_tokens=self.special_tokens,
            )
        except ValueError as error:
            raise ValueError(f"pattern: not a regular expression ({error}): {pattern}") from error

    @property
    def vocab_size(self) -> int:
        """Ids in all, special tokens included."""
        return len(self.ranks) + len(self.special_tokens)

    @property
    def bos(self) -> int:
        return self.special_tokens["<|bos|>"]

    def special(self, name: str) -> int:
        """The id of a special token, e.g. ``<|user_start|>``. Raises ValueError for an unknown name."""
        if name not in self.special_tokens:
            raise ValueError(f"no special token {name!r}; there are {', '.join(self.special_tokens)}")
        return self.special_tokens[name]

    # ----------------------------------------------------------------------------------------------
    # Text

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text: never a special token, whatever the text says.

        Half a surrogate pair, which has no UTF-8, is encoded as U+FFFD.
        """
        if len(text) <= _MAX_WHITESPACE_RUN:
            return self._encoding.encode_ordinary(text)
        return [
            token
            for piece in _without_long_whitespace(text)
            for token in self._encoding.encode_ordinary(piece)
        ]

    def encode_batch(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; a special token gives its name. Raises ValueError for an unknown id."""
        listed = [int(token) for token in ids]
        unknown = next((token for token in listed if not 0 <= token < self.vocab_size), None)
        if unknown is not None:
            raise ValueError(f"token id {unknown} is not in the vocabulary of {self.vocab_size} ids")
        return self._encoding.decode_bytes(listed)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int64 of shape (vocab_size,); 0 for special tokens."""
        import numpy as np

        lengths = [len(token) for token in self.ranks]
        return np.array(lengths + [0] * len(self.special_tokens), dtype=np.int64)

    # ----------------------------------------------------------------------------------------------
    # Conversations

    def render(self, conversation: Conversation, max_tokens: int | None = None) -> rendering.Rendered:
        """A conversation as ids with its loss mask; see `nanochat.rendering`."""
        return rendering.render(self, conversation, max_tokens)

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """A conversation that waits for the assistant's answer, as ids; see `nanochat.rendering`."""
        return rendering.render_prompt(self, conversation)

    # ----------------------------------------------------------------------------------------------
    # Files

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json, but for the digest at its end."""
        return self._document().to_json()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json; the file is whole or not there."""
        path = Path(path)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._document().to_bytes())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Tokenizer:
        """Raises DocumentError saying what is wrong, all of it."""
        return cls._from_bytes(json.dumps(document).encode(), "the tokenizer document")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json. Raises DocumentError naming the file and what is wrong, or OSError."""
        return cls._from_bytes(Path(path).read_bytes(), os.fspath(path))

    @classmethod
    def _from_bytes(cls, data: bytes, name: str) -> Tokenizer:
        document = TokenizerDocument.from_bytes(data, name)
        problems: list[str] = []
        ranks: list[bytes] = []
        for token, text in enumerate(document.ranks):
            try:
                ranks.append(base64.b64decode(text, validate=True))
            except (binascii.Error, ValueError) as error:
                problems.append(f"ranks: token {token} is not base64 ({error}): {text!r:.40}")
        problems = problems or _rank_problems(ranks)
        problems += _special_problems(document.special_tokens, len(document.ranks))
        if not problems:
            try:
                return cls(pattern=document.pattern, ranks=ranks, provenance=document.provenance)
            except ValueError as error:
                problems.append(str(error))
        raise DocumentError(f"{name} is not a usable tokenizer: {'; '.join(problems[:10])}")

    def _document(self) -> TokenizerDocument:
        return TokenizerDocument(
            pattern=self.pattern,
            ranks=tuple(base64.b64encode(token).decode() for token in self.ranks),
            special_tokens=self.special_tokens,
            provenance=self.provenance,
        )


def _rank_problems(ranks: Sequence[bytes]) -> list[str]:
    problems: list[str] = []
    first: dict[bytes, int] = {}
    for token, spelling in enumerate(ranks):
        if not spelling:
            problems.append(f"ranks: token {token} is empty")
        elif spelling in first:
            problems.append(f"ranks: token {token} ({spelling!r:.40}) is the same as token {first[spelling]}")
        first.setdefault(spelling, token)
    missing = [byte for byte in range(256) if bytes([byte]) not in first]
    if missing:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:8]) + (" …" if len(missing) > 8 else "")
        problems.append(f"ranks: {len(missing)} of the 256 bytes are no token ({shown})")
    return problems


def _special_problems(special_tokens: Mapping[str, int], ranks: int) -> list[str]:
    problems: list[str] = []
    for token, name in enumerate(SPECIAL_TOKENS, start=ranks):
        if name not in special_tokens:
            problems.append(f"special_tokens: {name} is missing")
        elif special_tokens[name] != token:
            problems.append(
                f"special_tokens: {name} has id {special_tokens[name]}, but it is {token} after {ranks} ranks"
            )
    unknown = sorted(set(special_tokens) - set(SPECIAL_TOKENS))
    if unknown:
        problems.append(f"special_tokens: unknown {', '.join(unknown)}")
    return problems


def _without_long_whitespace(text: str) -> list[str]:
    """`text` cut so that no piece holds more white space in a row than tiktoken can split."""
    cuts = [
        cut
        for run in _LONG_WHITESPACE.finditer(text)
        for cut in range(run.start() + _MAX_WHITESPACE_RUN, run.end(), _MAX_WHITESPACE_RUN)
    ]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
