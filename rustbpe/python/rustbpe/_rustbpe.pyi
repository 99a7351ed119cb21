from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

GPT4_PATTERN: str
Ties = Literal["smallest-id", "huggingface"]
Progress = Callable[[str, int, int], object]
COUNTS_VERSION: int

class CountsInfo(TypedDict):
    """How a counts file was made, and what was looked at (after the caps)."""

    pattern: str
    text_column: str
    doc_cap: int | None
    max_chars: int | None
    input_sha256: str
    rows: int
    characters: int
    bytes: int
    words: int
    unique_words: int

class Tokenizer:
    """A byte-level BPE tokenizer: ids 0-255 are the bytes, then come the merges in the order learned.

    vocab_size counts the bytes and the merges. Where the text has fewer pairs to merge than asked
    for, a UserWarning says so and the vocabulary is smaller. All raise ValueError for a vocabulary
    below 256, a bad pattern, or no text at all; OSError or ValueError, naming the file, for a file
    that is missing, damaged or of another kind.
    """

    # ties: which of the pairs that occur equally often is joined first; "huggingface" takes them in the
    # order of Hugging Face's byte alphabet. progress(phase, done, of) is called as files are counted
    # ("count") and, ten times a second, as merges are learned ("merge"); what it raises ends the training.
    def __init__(self) -> None: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        pattern: str | None = None,
        buffer_size: int = 8192,
        *,
        ties: Ties = "smallest-id",
        progress: Progress | None = None,
    ) -> None:
        """Learn from strings; buffer_size of them are counted at a time."""

    def train_from_parquet_files(
        self,
        parquet_paths: Sequence[str | PathLike[str]],
        vocab_size: int,
        pattern: str | None = None,
        text_column: str = "text",
        doc_cap: int | None = None,
        max_chars: int | None = None,
        *,
        ties: Ties = "smallest-id",
        progress: Progress | None = None,
    ) -> None:
        """Learn from a text column.

        doc_cap: characters of a document that are looked at. max_chars: characters in all, over the
        files in order; the document that crosses it is cut there.
        """

    def train_from_counts(
        self,
        paths: Sequence[str | PathLike[str]],
        vocab_size: int,
        *,
        min_count: int | None = None,
        ties: Ties = "smallest-id",
        progress: Progress | None = None,
    ) -> int:
        """Learn from counts files, all made with the same pattern and caps; any order gives the same.

        min_count: words that occur less often, over all files, are left out. Saves memory where there
        are very many; the merges may differ. Returns how many different words are left.
        """

    @staticmethod
    def from_ranks(
        ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]],
        pattern: str | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> Tokenizer:
        """A tokenizer with a vocabulary that is there already, learned by whomever.

        Ids are ranks and may leave gaps. Raises ValueError where two tokens have one id or one
        spelling, where one of the 256 bytes is no token, or for a bad pattern.
        """

    @classmethod
    def from_tiktoken(
        cls, path: str | PathLike[str], pattern: str, special_tokens: Mapping[str, int] | None = None
    ) -> Tokenizer:
        """A tokenizer from a .tiktoken file: in each line a token in base64 and its id.

        Such a file says nothing of pattern and special tokens. Raises OSError, or ValueError naming
        the file, and the line where it is one.
        """

    def to_tiktoken(self, path: str | PathLike[str]) -> None:
        """Write the vocabulary as a .tiktoken file, which is whole or not there."""

    @classmethod
    def from_huggingface(cls, path: str | PathLike[str]) -> Tokenizer:
        """A tokenizer from Hugging Face's tokenizer.json of a byte-level BPE model.

        Its encode(text, allowed_special="all") gives what Hugging Face's gives with
        add_special_tokens=False. Raises OSError, or ValueError naming the file and what of it
        rustbpe cannot express: normalizers, other pre-tokenizers, merges out of order.
        """

    def to_huggingface(self, path: str | PathLike[str]) -> None:
        """Write everything as Hugging Face's tokenizer.json, which is whole or not there."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]: ...
    def get_merges(self) -> list[tuple[int, int, int]]:
        """(left, right, joined): the ids each token is joined from, by the joined id.

        A token that no joining reaches, as an imported vocabulary may have, is left out: only a whole
        word becomes it.
        """

    def get_pattern(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of tokens outside the vocabulary, by id; none after a training.

        Set it to give them. Raises ValueError for an id that is taken.
        """

    @special_tokens.setter
    def special_tokens(self, tokens: dict[str, int]) -> None: ...
    def encode(self, text: str, allowed_special: Collection[str] | Literal["all"] | None = None) -> list[int]:
        """The ids of a text: those of tiktoken with these ranks.

        Text that merely looks like a special token is ordinary text (tiktoken's encode_ordinary),
        unless its name is in allowed_special; where names overlap the leftmost is taken, then the
        longest. Unlike tiktoken's encode this raises for no text. Half a surrogate pair, which has no
        UTF-8, is encoded as U+FFFD.
        """

    def encode_batch(self, texts: Iterable[str], *, threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on several threads; None: one for each processor."""

    def encode_into(
        self,
        texts: str | Iterable[str],
        out: npt.NDArray[np.uint16] | npt.NDArray[np.uint32],
        *,
        bos: int | None = None,
        threads: int | None = None,
    ) -> int:
        """Write the ids of the texts, one text after another, to the front of `out`; returns how many.

        out: any writable, contiguous buffer of uint16 or uint32. bos: an id before each text. Raises
        ValueError, having written nothing, when `out` is too short, or has 16 bits for an
        id above 65535.
        """

    def encode_to_numpy(
        self,
        texts: str | Iterable[str],
        dtype: Literal["uint16", "uint32"] = "uint32",
        *,
        bos: int | None = None,
        threads: int | None = None,
    ) -> npt.NDArray[Any]:
        """`encode_into` an array of the right length. Needs numpy."""

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of ids. errors is that of bytes.decode, for ids that end inside a character."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; a special token gives its name. Raises ValueError for an unknown id."""

def count_words(
    parquet_path: str | PathLike[str],
    counts_path: str | PathLike[str],
    pattern: str | None = None,
    *,
    text_column: str = "text",
    doc_cap: int | None = None,
    max_chars: int | None = None,
) -> CountsInfo:
    """Count the words of one parquet file into a counts file, which is whole or not there.

    Both caps are this file's own: what is counted of a file never depends on another, so counts add
    up exactly. Raises as Tokenizer does, and ValueError for a file without any words.
    """

def counts_info(counts_path: str | PathLike[str]) -> CountsInfo:
    """How a counts file was made, and its totals. Verifies the file."""
