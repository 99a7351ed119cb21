"""Text columns of parquet files, through pyarrow, without a copy or a Python object per document."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    # Offsets into UTF-8 text, one more than there are rows, and the text; whether the offsets have 64 bits or
    # 32; the number of the first offset; rows; rows of the file before these.
    Batch = tuple[pa.Buffer, pa.Buffer | None, bool, int, int, int]

# A batch is at most this large: little memory, and Ctrl-C is looked for in between.
_BATCH_ROWS = 2048
_BATCH_BYTES = 8 << 20


def digest(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def start_digest(path: str | os.PathLike[str]) -> Future[str]:
    """`digest` on a thread of its own."""
    thread = ThreadPoolExecutor(max_workers=1)
    result = thread.submit(digest, path)
    thread.shutdown(wait=False)
    return result


def readers(path: str | os.PathLike[str], column: str, most: int) -> list[Iterator[Batch]]:
    """Up to `most` iterators that share the row groups of a column; each is for one thread at a time.

    One alone gives all rows in order. A null is an empty document. Raises FileNotFoundError; ValueError,
    naming the file, for what is not parquet, has no such column or no strings in it. An iterator raises
    OSError where the file breaks off, naming the row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise FileNotFoundError(2, "no such parquet file", os.fspath(path))
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: is not a readable parquet file ({error}); fetch or write it again"
        ) from error
    _require_text(metadata.schema.to_arrow_schema(), path, column)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    rows_before = accumulate(sizes[:-1], initial=0)
    # One iterator for all: each reader takes the next row group when it is done with one.
    groups = iter([*zip(range(len(sizes)), rows_before, strict=False)])
    return [_batches(path, column, groups) for _ in range(max(1, min(most, len(sizes))))]


def _batches(path: str | os.PathLike[str], column: str, groups: Iterator[tuple[int, int]]) -> Iterator[Batch]:
    """The batches of row groups, which are given by their number and the rows before them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group, rows_before in groups:
            try:
                rows = _rows_per_batch(file.metadata.row_group(group))
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                    if len(batch):
                        yield (*_as_text(batch.column(0)), rows_before)
                        rows_before += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise OSError(
                    f"{path}: row group {group} cannot be read ({error}); the file is damaged: "
                    "fetch or write it again"
                ) from error


def _rows_per_batch(group: Any) -> int:
    row_bytes = group.total_byte_size // max(1, group.num_rows)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))


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


def _as_text(array: Any) -> tuple[pa.Buffer, pa.Buffer | None, bool, int, int]:
    import pyarrow as pa

    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        array = array.cast(pa.large_string())
    if array.null_count:
        array = array.fill_null("")
    _, offsets, text = array.buffers()
    return offsets, text, pa.types.is_large_string(array.type), array.offset, len(array)
