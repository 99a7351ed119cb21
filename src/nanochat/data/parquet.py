"""Text in parquet files: is it usable, and its documents in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TEXT = "text"


class TextFileError(ValueError):
    """A parquet file that cannot be used as text: which one, why, and the next step."""


def inspect_text(path: Path, name: str) -> tuple[int, int, int]:
    """(rows, empty, characters) of a file: all rows, those null or blank, and the characters of the
    others. Everything is read once.

    Raises TextFileError, calling the file `name`, where it is not parquet, has not one column
    ``text`` of strings, is not UTF-8, or has no document at all.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = empty = characters = 0
    try:
        with pq.ParquetFile(path) as file:
            _require_text_column(file.schema_arrow, name)
            for batch in file.iter_batches(columns=[TEXT]):
                text = _plain(batch.column(0))
                text.validate(full=True)
                rows += len(text)
                blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True)
                empty += pc.sum(blank).as_py() or 0
                characters += pc.sum(pc.utf8_length(text.filter(pc.invert(blank)))).as_py() or 0
    except TextFileError:
        raise
    except UnicodeDecodeError as error:
        raise TextFileError(_not_utf8(name, rows, error)) from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, pa.ArrowInvalid) and "utf" in str(error).lower():
            raise TextFileError(_not_utf8(name, rows, error)) from error
        raise TextFileError(
            f"{name}: not a readable parquet file ({error}). Replace it at its source."
        ) from error
    if rows == empty:
        raise TextFileError(
            f"{name}: has no text ({rows} rows, all null or blank). Leave the file out, or fill its "
            "'text' column."
        )
    return rows, empty, characters


def iter_texts(path: Path, start_document: int = 0) -> Iterator[tuple[int, str]]:
    """(index, text) of the file's documents from `start_document` on, one row group in memory.

    Null and blank rows are skipped and still counted: an index names the same document always.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _require_text_column(file.schema_arrow, str(path))
        first = 0
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if after > start_document:
                text = file.read_row_group(group, columns=[TEXT]).column(TEXT)
                for index, document in enumerate(text.to_pylist(), start=first):
                    if index >= start_document and document and not document.isspace():
                        yield index, document
            first = after


def iter_documents(paths: Iterable[Path]) -> Iterator[str]:
    """The texts of several files, in order."""
    for path in paths:
        for _, text in iter_texts(path):
            yield text


def _require_text_column(schema: Any, name: str) -> None:
    import pyarrow as pa

    if TEXT not in schema.names:
        raise TextFileError(
            f"{name}: has no column 'text' (its columns are {', '.join(schema.names)}). Rename the column "
            "that holds the documents to 'text'."
        )
    if schema.names.count(TEXT) > 1:
        raise TextFileError(
            f"{name}: has {schema.names.count(TEXT)} columns 'text'. Write the file again with one of them, "
            "the documents."
        )
    kind = schema.field(TEXT).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise TextFileError(
            f"{name}: its column 'text' holds {kind}, not strings. Write the file again with strings (UTF-8)."
        )


def _plain(column: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if pa.types.is_string(column.type) else column.cast(pa.large_string())


def _not_utf8(name: str, rows: int, error: Exception) -> str:
    return (
        f"{name}: its column 'text' is not UTF-8 (among the rows from {rows} on: {error}). "
        "Decode the text with its own encoding and write the file again."
    )
