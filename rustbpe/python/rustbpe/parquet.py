"""Text columns of parquet files, through pyarrow, without a Python object per document."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Documents per batch: enough work for all threads, little memory, and Ctrl-C is looked for in between.
_BATCH_ROWS = 2048


def digest(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_batches(path: str | os.PathLike[str], column: str) -> Iterator[tuple[bytes, bytes]]:
    """(offsets, text) of batch after batch of a column: n + 1 native int64 offsets into UTF-8 text.

    A null is an empty document. Raises FileNotFoundError; ValueError, naming the file, for what is
    not parquet, has no such column or no strings in it; OSError where the file breaks off, naming
    the row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise FileNotFoundError(2, "no such parquet file", os.fspath(path))
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: is not a readable parquet file ({error}); fetch or write it again"
        ) from error
    with file:
        _require_text(file.schema_arrow, path, column)
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
                    yield _buffers(batch.column(0).cast(pa.large_string()).fill_null(""))
            except (pa.ArrowException, OSError) as error:
                raise OSError(
                    f"{path}: row group {group} cannot be read ({error}); the file is damaged: "
                    "fetch or write it again"
                ) from error


def _require_text(schema: Any, path: str | os.PathLike[str], column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise ValueError(
            f"{path}: has no column {column!r}; its columns are {', '.join(schema.names) or 'none'}: name "
            "the one that holds the text"
        )
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)
    ):
        raise ValueError(
            f"{path}: column {column!r} holds {kind}, not strings; name a text column or write it as strings"
        )


def _buffers(array: Any) -> tuple[bytes, bytes]:
    _, offsets, text = array.buffers()
    start, stop = array.offset * 8, (array.offset + len(array) + 1) * 8
    return offsets.to_pybytes()[start:stop], text.to_pybytes() if text else b""
