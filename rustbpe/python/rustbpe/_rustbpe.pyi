from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TypedDict

GPT4_PATTERN: str
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

    def __init__(self) -> None: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        pattern: str | None = None,
        buffer_size: int = 8192,
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
    ) -> None:
        """Learn from a text column.

        doc_cap: characters of a document that are looked at. max_chars: characters in all, over the
        files in order; the document that crosses it is cut there.
        """

    def train_from_counts(
        self, paths: Sequence[str | PathLike[str]], vocab_size: int, *, min_count: int | None = None
    ) -> None:
        """Learn from counts files, all made with the same pattern and caps; any order gives the same.

        min_count: words that occur less often, over all files, are left out. Saves memory where there
        are very many; the merges may differ.
        """

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]: ...
    def get_pattern(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]:
        """Equal to tiktoken's encode_ordinary with these ranks."""

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
