"""Text columns of parquet files, through pyarrow, without a copy or a Python object per document."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

    # Offsets into UTF-8 text, one more than there are rows, and the text; whether the offsets have 64 bits or
    # 32; the number of the first offset; rows.
    Batch = tuple[pa.Buffer, pa.Buffer | None, bool, int, int]

Item = TypeVar("Item")

# A batch is at most this large: work for all threads, little memory, and Ctrl-C is looked for in between.
_BATCH_ROWS = 2048
_BATCH_BYTES = 8 << 20

# Batches that each reader decodes before they are asked for.
_AHEAD = 4

# A core decodes about as much as two or three count; where there are few cores, one reader is enough.
_CORES_PER_READER = 4


def digest(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_batches(path: str | os.PathLike[str], column: str) -> Iterator[Batch]:
    """The rows of a column, batch after batch, decoded ahead on other threads.

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
        groups = range(file.num_row_groups)
    readers = max(1, min(len(groups), (os.cpu_count() or 1) // _CORES_PER_READER))
    with contextlib.ExitStack() as stack:
        streams = []
        for reader in range(readers):
            decoded = _ahead(_decoded_groups(path, column, groups[reader::readers]))
            streams.append(stack.enter_context(contextlib.closing(decoded)))
        for group in groups:
            yield from iter(streams[group % readers].__next__, None)


def _decoded_groups(
    path: str | os.PathLike[str], column: str, groups: Iterable[int]
) -> Generator[Batch | None, None, None]:
    """The batches of these row groups, and None at the end of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in groups:
            try:
                rows = _rows_per_batch(file.metadata.row_group(group))
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                    if len(batch):
                        yield _as_text(batch.column(0))
            except (pa.ArrowException, OSError) as error:
                raise OSError(
                    f"{path}: row group {group} cannot be read ({error}); the file is damaged: "
                    "fetch or write it again"
                ) from error
            yield None


def _rows_per_batch(group: Any) -> int:
    row_bytes = group.total_byte_size // max(1, group.num_rows)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))


def _ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same items, made on a thread of their own before they are asked for."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            waiting = deque(thread.submit(next, items, end) for _ in range(_AHEAD))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]  # not the end
        finally:
            thread.shutdown(cancel_futures=True)
            items.close()


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


def _as_text(array: Any) -> Batch:
    import pyarrow as pa

    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        array = array.cast(pa.large_string())
    if array.null_count:
        array = array.fill_null("")
    _, offsets, text = array.buffers()
    return offsets, text, pa.types.is_large_string(array.type), array.offset, len(array)
