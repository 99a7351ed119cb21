from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.parquet import TextFileError, inspect_text, iter_documents, iter_texts


def write(path: Path, texts: Any, kind: pa.DataType | None = None, column: str = "text") -> Path:
    pq.write_table(pa.table({column: pa.array(texts, kind or pa.string())}), path, row_group_size=2)
    return path


def test_inspection_counts_rows_blank_ones_and_the_characters_of_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["one", None, "", " \n", "zwölf", "six"])
    assert inspect_text(path, "a") == (6, 3, 11)


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_kind_of_string_column_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", ["one", "two", "one"], kind)
    assert inspect_text(path, "a") == (3, 0, 9)
    assert [text for _, text in iter_texts(path)] == ["one", "two", "one"]


def test_reading_skips_blank_documents_and_keeps_every_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a", None, "c", "", "e", "f", "\t"])
    assert list(iter_texts(path)) == [(0, "a"), (2, "c"), (4, "e"), (5, "f")]


@pytest.mark.parametrize("start", range(9))
def test_reading_from_a_document_on_is_the_tail_of_reading_all(tmp_path: Path, start: int) -> None:
    path = write(tmp_path / "a.parquet", ["a", None, "c", "", "e", "f", "g"])
    assert list(iter_texts(path, start)) == [item for item in iter_texts(path) if item[0] >= start]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.parquet", [name, None, name * 2]) for name in "ba"]
    assert list(iter_documents(paths)) == ["b", "bb", "a", "aa"]


def test_a_missing_text_column_is_named_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["one"], column="content")
    with pytest.raises(
        TextFileError, match=r"shard x: has no column 'text' \(its columns are content\)\. Rename"
    ):
        inspect_text(path, "shard x")
    with pytest.raises(TextFileError, match="has no column 'text'"):
        list(iter_texts(path))


def test_a_doubled_text_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"]), path)
    with pytest.raises(TextFileError, match="shard x: has 2 columns 'text'"):
        inspect_text(path, "shard x")
    with pytest.raises(TextFileError, match="has 2 columns 'text'"):
        list(iter_texts(path))


@pytest.mark.parametrize("bits", [0x04, 0x15, 0xFF])
def test_a_file_with_any_byte_flipped_is_read_or_refused(tmp_path: Path, bits: int) -> None:
    path = write(tmp_path / "a.parquet", ["some text", "and more"])
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
        try:
            inspect_text(path, "shard x")
        except TextFileError:
            refused += 1
    assert refused > len(whole) / 4


@pytest.mark.parametrize("kind", [pa.binary(), pa.int64(), pa.list_(pa.string())])
def test_a_text_column_of_another_type_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", [None], kind)
    with pytest.raises(TextFileError, match=r"shard x: its column 'text' holds .*, not strings"):
        inspect_text(path, "shard x")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    latin = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\x00\x00\x00\x00\x03\x00\x00\x00\x06\x00\x00\x00"), pa.py_buffer(b"onef\xfcr")
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": latin}), path)
    with pytest.raises(TextFileError, match=r"shard x.*not UTF-8.*Decode"):
        inspect_text(path, "shard x")


@pytest.mark.parametrize("texts", [[], [None, "", "  "]])
def test_a_file_without_any_text_is_refused(tmp_path: Path, texts: list[str | None]) -> None:
    path = write(tmp_path / "a.parquet", texts)
    with pytest.raises(TextFileError, match="shard x: has no text"):
        inspect_text(path, "shard x")


def test_a_truncated_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["some text"] * 100)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TextFileError, match="shard x: not a readable parquet file"):
        inspect_text(path, "shard x")
    path.write_bytes(b"")
    with pytest.raises(TextFileError, match="shard x: not a readable parquet file"):
        inspect_text(path, "shard x")
