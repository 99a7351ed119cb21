"""The benchmarks of the tokenizer: how text is gathered, and what makes two libraries comparable."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

import rustbpe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", name="bench")
def _bench() -> ModuleType:
    return _script("bpe_corpus")


def _script(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_a_page_keeps_its_words_in_paragraphs_and_loses_its_markup(bench: ModuleType) -> None:
    page = (
        "<head><title>t</title></head><p class='a'>One &amp; <b>two</b></p>"
        "<!-- no --><p>a < b</p><script>x<y</script>"
    )
    paragraphs = [text.strip() for text in bench.text_of_html(page).split("\n\n") if text.strip()]
    assert paragraphs == ["One & two", "a < b"]


def test_a_manual_page_keeps_its_words_and_loses_its_requests(bench: ModuleType) -> None:
    source = '.TH LS 1\n.SH NAME\nls \\- list\n.B \\-a\nshow \\fIall\\fR of it\n.\\" a remark\n'
    assert " ".join(bench.text_of_manual(source).split()) == "NAME ls - list -a show all of it"


def test_only_docstrings_are_prose_in_a_python_file(bench: ModuleType) -> None:
    source = '"""The file."""\nx = "no"\ndef f():\n    """The function."""\n'
    assert bench.docstrings(source) == "The file.\n\nThe function."
    assert bench.docstrings("def (") == ""


def test_a_paragraph_is_kept_once(bench: ModuleType) -> None:
    documents = bench.Documents()
    assert list(documents.of("One.\n\nTwo.\n\nOne.")) == ["One.\n\nTwo."]
    assert list(documents.of("Two.\n\nThree.")) == ["Three."]


def test_a_dictionary_without_empty_lines_is_cut_between_lines(bench: ModuleType) -> None:
    text = "\n".join(f"word{number} meaning" for number in range(50_000))
    documents = list(bench.Documents().of(text))
    assert max(map(len, documents)) < 100_000
    assert [line for document in documents for line in document.split("\n") if line] == text.split("\n")


def test_a_long_text_is_cut_between_paragraphs_into_documents_like_the_web_s(bench: ModuleType) -> None:
    text = "\n\n".join(f"paragraph {number} " * 5 for number in range(20_000))
    documents = list(bench.Documents().of(text))
    assert "\n\n".join(documents) == "\n\n".join(paragraph.rstrip() for paragraph in text.split("\n\n"))
    lengths = sorted(map(len, documents))
    assert 0.8 < lengths[len(lengths) // 2] / bench.MEDIAN_CHARACTERS < 1.25


@pytest.mark.parametrize(
    ("path", "prose"),
    [
        ("/usr/share/doc/x/html/index.html", True),
        ("/usr/share/doc/apache2-doc/manual/index.html.de", True),
        ("/usr/share/doc/x/a.txt.gz", True),
        ("/usr/share/man/man1/ls.1.gz", True),
        ("/usr/share/dictd/gcide.dict.dz", True),
        ("/usr/share/doc/x/changelog.Debian.gz", False),
        ("/usr/share/doc/x/html/_sources/index.rst.txt", False),
        ("/usr/share/doc/x/logo.png", False),
    ],
)
def test_what_holds_prose_in_a_package(bench: ModuleType, path: str, prose: bool) -> None:
    assert (bench.reader_of(path) is not None) == prose


def test_a_file_that_is_no_text_gives_none(bench: ModuleType) -> None:
    assert bench.reader_of("/a.txt")(b"\xff\xfe") == ""
    assert bench.reader_of("/a.txt.gz")(b"no gzip") == ""


def test_shards_and_held_out_documents_share_nothing_and_have_nanochat_s_layout(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHARD_BYTES", 30_000)
    documents = [f"document {number:06}".encode() for number in range(6_000)]
    bench.write_corpus(list(documents), tmp_path, held_out_bytes=1_500, bytes_wanted=60_000)
    texts = {path.name: pq.read_table(path).column("text").to_pylist() for path in tmp_path.glob("*.parquet")}
    assert sorted(texts) == ["held_out.parquet", "shard_00000.parquet", "shard_00001.parquet"]
    assert [len(texts[name]) for name in sorted(texts)] == [100, 2_000, 2_000]
    assert len(set().union(*texts.values())) == 4_100
    row_groups = pq.ParquetFile(tmp_path / "shard_00000.parquet").metadata
    assert [row_groups.row_group(index).num_rows for index in range(2)] == [1024, 976]
    assert row_groups.row_group(0).column(0).compression == "ZSTD"


def test_the_pair_that_a_token_was_merged_from_is_found_again() -> None:
    encode = _script("bpe_encode")
    tokenizer = rustbpe.Tokenizer()
    text = "the cat that sat at the hat; the other cat then gathers them"
    tokenizer.train_from_iterator([text], 272, pattern=encode.PATTERN)
    ranks = {bytes(token): number for token, number in tokenizer.get_mergeable_ranks()}
    for token, number in ranks.items():
        if number >= 256:
            left, right = encode.merge_of(token, ranks)
            assert left + right == token
            assert max(ranks[left], ranks[right]) < number


def test_synthetic_words_are_all_different_words() -> None:
    train = _script("bpe_train")
    # The last ones are those of two hundred files of a million words.
    text = train.synthetic_words(np.concatenate([np.arange(10_000), np.arange(100_490_000, 100_500_000)]))
    words = re.findall(" [a-z]{7}", text)
    assert "".join(words) == text
    assert len(set(words)) == 20_000


def test_the_table_has_medians_and_ratios(tmp_path: Path) -> None:
    bench = _script("bpe_train").Bench(BENCHMARKS / "bpe_train.py", tmp_path, None, tmp_path)
    for name, seconds in [("ours", [1, 2, 30]), ("other", [8, 4000, 9])]:
        bench.rows += [{"name": name, "wall_s": value, "cpu_s": value / 2} for value in seconds]
    bench.rows.append({"name": "other", "error": ["killed"]})
    lines = [line.split() for line in bench.table(["wall_s", "peak_mb"], "ours").splitlines()[1:]]
    assert lines == [["ours", "2", "1.00", "1.00"], ["other", "9", "4.50", "4.50"]]


def test_a_training_is_measured_in_a_process_of_its_own(bench: ModuleType, tmp_path: Path) -> None:
    documents = [f"the cat {number} sat at the hat".encode() for number in range(500)]
    bench.write_corpus(documents, tmp_path, held_out_bytes=100, bytes_wanted=10_000)
    command = [sys.executable, str(BENCHMARKS / "bpe_train.py"), str(tmp_path), "--implementations", "ours"]
    options = ["--vocab-size", "270", "--rounds", "2", "--threads", "1"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    first, second = map(json.loads, run.stdout.splitlines())
    assert first["sha256"] == second["sha256"]
    assert (first["name"], first["merges"]) == ("ours", 14)
    assert min(first["wall_s"], first["peak_mb"]) > 0


def test_a_package_that_cannot_be_had_is_passed_over(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(bench.debian_texts(["no-such-doc"], tmp_path / "packages", translations=False)) == []
    assert "no-such-doc: not to be had here" in capsys.readouterr().err


def test_a_package_is_read_without_its_translations(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "x-doc_1_all.deb"
    with tarfile.open(archive, "w") as tar:
        for name, text in [("./doc/a.txt", "English"), ("./doc/de/a.txt", "Deutsch"), ("./doc/a.png", "no")]:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    # What dpkg-deb --fsys-tarfile does to a real archive is to unpack exactly this.
    unpacking = tmp_path / "dpkg-deb"
    unpacking.write_text('#!/bin/sh\nexec cat "$2"\n')
    unpacking.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert list(bench.package_texts(archive, translations=False)) == ["English"]
    assert list(bench.package_texts(archive, translations=True)) == ["English", "Deutsch"]
