"""Gather text into parquet files like nanochat's, for the benchmarks of training and encoding.

    python benchmarks/bpe_corpus.py --megabytes 300 --kind english --debian
    python benchmarks/bpe_corpus.py --megabytes 1000 --kind multilingual --debian

The text is what the machine has and what Debian's documentation packages bring: manuals, novels and
dictionaries, no crawl of the web. Nothing of it is ours to publish; it stays in a folder that git ignores.

- the shared test data's `pretrain_text`, where it is there (NANOCHAT_TEST_DATA, or ../shared/data);
- this Python's standard library and packages: docstrings and documentation, for `code` whole files;
- with --debian, documentation packages by `apt-get download`, read through `dpkg-deb`. That needs a
  Debian, package lists (`apt-get update`) and a network; packages once fetched are kept in --packages.

A paragraph that was seen before is left out. Long texts are cut between paragraphs, so that documents are
as long as those of web text. Documents are shuffled, and --held-out megabytes of them go to
`held_out.parquet`; the rest to `shard_*.parquet`, of 50 MB of text each.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html
import json
import math
import os
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("NANOCHAT_TEST_DATA", ROOT.parent / "shared/data"))

SHARD_BYTES = 50_000_000
ROW_GROUP = 1024
SEED = 1

# Characters of a document: the median and the spread (of the logarithm) of English web text.
MEDIAN_CHARACTERS = 2_700
LOG_SPREAD = 0.8

LONGEST_PARAGRAPH = 10_000  # characters
LINES_OF_LONG = 40


def names(text: str) -> list[str]:
    return text.split()


# Names differ between Debian's releases; one that is missing is reported and passed over.
PROSE = names("""
    linux-doc-6.12 linux-doc-6.1 anarchism dict-gcide dict-wn dict-foldoc dict-jargon perl-doc
    lilypond-doc-html debian-reference-en debian-policy developers-reference bible-kjv-text manpages
    manpages-dev freebsd-manpages python3.13-doc python3.11-doc postgresql-doc-17 postgresql-doc-15
    apache2-doc octave-doc racket-doc erlang-doc nodejs-doc python-django-doc llvm-19-doc llvm-14-doc
    maxima-doc python-sympy-doc libboost1.74-doc qtbase5-doc-html cppreference-doc-en-html
""")
API = names("openjdk-21-doc openjdk-17-doc rust-doc ghc-doc python-pandas-doc twisted-doc")
_LANGUAGES = names("""
    cs da de el es fi fr hi hu id it ja ko nl pl pt pt-br ru sv tr uk vi zh zh-cn zh-tw km ca sl sk dz gl om
""")
_DICTIONARIES = names("""
    deu-eng eng-deu jpn-eng jpn-deu hun-eng epo-eng eng-hun eng-fin deu-fra deu-swe pol-eng hrv-eng eng-tur
    deu-spa fin-eng eng-ces eng-hrv eng-bul eng-jpn deu-rus pol-rus eng-ara swe-deu fra-ita ara-eng pol-deu
    fra-deu deu-pol eng-hin pol-spa fra-spa pol-fra pol-ita nld-spa fra-bre ell-eng pol-fin
""")
MULTILINGUAL = [
    "debian-handbook",
    "installation-guide-amd64",
    *(f"dict-freedict-{pair}" for pair in _DICTIONARIES),
    *(
        f"{family}-{language}"
        for language in _LANGUAGES
        for family in ("libreoffice-help", "manpages", "debian-reference", "debian-faq", "aptitude-doc")
    ),
]

TEXT_SUFFIXES = {".html", ".htm", ".xhtml", ".txt", ".rst", ".md", ".pod", ".dict"}
CODE_SUFFIXES = {".py", ".pyi", ".pyx", ".h", ".hpp", ".c", ".cpp", ".js", ".ts"}

_PARAGRAPHS = re.compile(r"\n\s*\n")
_TRANSLATION = re.compile(
    r"[./_](?:cs|da|de|el|es|fi|fr|hu|id|it|ja|ko|nl|pl|pt|ro|ru|sv|tr|uk|vi|zh)(?:[-_][A-Za-z]{2,4})?(?=[./])"
)
_MANUAL_PAGE = re.compile(r"/man/(?:.*/)?man\d\w*/")


# -- texts of files --------------------------------------------------------------------------------

_HTML_DROPPED = re.compile(r"<!--.*?-->|<(script|style|head|nav|svg)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_HTML_BLOCK = re.compile(
    r"</?(?:p|div|h\d|ul|ol|dl|table|pre|section|article|blockquote|dt|header|footer)\b[^>]*>", re.IGNORECASE
)
_HTML_LINE = re.compile(r"<(?:br|li|tr|dd)\b[^>]*>", re.IGNORECASE)
_HTML_TAG = re.compile(r"</?[a-zA-Z!?][^>]*>")


def text_of_html(page: str) -> str:
    """A page without markup. Blocks become paragraphs; whitespace inside them stays as it is."""
    page = _HTML_DROPPED.sub("", page)
    page = _HTML_BLOCK.sub("\n\n", page)
    page = _HTML_LINE.sub("\n", page)
    return html.unescape(_HTML_TAG.sub("", page))


_ROFF_HEADING = re.compile(r"^[.'](?:SH|SS|TP|PP|P|LP|IP|Sh|Ss|Pp|It)\b ?(.*)$", re.MULTILINE)
_ROFF_WORDS = re.compile(r"^[.'](?:[BIR]{1,2}|Nm|Nd|Xr|Fl|Ar|Fn|Pa|Cm|Va|Li|Em|Sy) (.*)$", re.MULTILINE)
_ROFF_REQUEST = re.compile(r"^[.'].*\n?", re.MULTILINE)
_ROFF_ESCAPE = re.compile(r"\\(?:f(?:\[\w*\]|\(..|.)|s[-+]?\d|&|/|,|c|\|)|\\\".*")


def text_of_manual(source: str) -> str:
    """A manual page without its roff, roughly: requests are dropped, headings and marked words stay."""
    source = _ROFF_HEADING.sub(r"\n\1\n", source)
    source = _ROFF_WORDS.sub(r"\1", source)
    source = _ROFF_REQUEST.sub("", source)
    source = _ROFF_ESCAPE.sub("", source)
    return source.replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\e", "\\")


def docstrings(source: str) -> str:
    """The docstrings of a Python file, one paragraph or more each; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text)


# -- sources: texts of any length ------------------------------------------------------------------


def shared_texts() -> Iterator[str]:
    """The documents of the shared test data."""
    for path in sorted((SHARED_DATA / "pretrain_text").glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP, columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)


def python_texts(*, code: bool) -> Iterator[str]:
    """The documentation in this Python's library and packages; with `code` whole source files."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    for path in files_below(folders):
        if path.suffix not in CODE_SUFFIXES | TEXT_SUFFIXES or path.suffix == ".dict":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if code:
            yield text if path.suffix in CODE_SUFFIXES else ""
        elif path.suffix == ".py":
            yield docstrings(text)
        elif path.suffix in TEXT_SUFFIXES:
            yield text_of_html(text) if "htm" in path.suffix else text


def files_below(folders: Iterable[str]) -> Iterator[Path]:
    """Every file once, in the order of names."""
    seen = set()
    for folder in sorted(folders):
        for parent, subfolders, names in os.walk(folder):
            subfolders.sort()
            for path in (Path(parent) / name for name in sorted(names)):
                if path not in seen:
                    seen.add(path)
                    yield path


def debian_texts(names: Iterable[str], packages: Path, *, translations: bool) -> Iterator[str]:
    """The texts of Debian packages. One that cannot be had is reported and passed over."""
    for name in names:
        archive = fetched(name, packages)
        if archive is None:
            print(f"{name}: not to be had here", file=sys.stderr)
            continue
        print(archive.name, file=sys.stderr)
        yield from package_texts(archive, translations=translations)


def fetched(name: str, packages: Path) -> Path | None:
    """The archive of a Debian package, downloaded where it is not there yet."""
    packages.mkdir(parents=True, exist_ok=True)
    if not list(packages.glob(f"{name}_*.deb")):
        try:
            subprocess.run(
                ["apt-get", "-qq", "download", name], cwd=packages, capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
    return next(iter(packages.glob(f"{name}_*.deb")), None)


def package_texts(archive: Path, *, translations: bool) -> Iterator[str]:
    """The texts of the documents in a Debian archive; translated ones only where asked for."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        # Its complaint where we stop before the end is nobody's concern.
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar,
    ):
        for member in tar:
            path = member.name.removeprefix(".")
            if not member.isfile() or (not translations and _TRANSLATION.search(path)):
                continue
            text_of = reader_of(path)
            if text_of is None:
                continue
            data = tar.extractfile(member)
            assert data is not None
            yield text_of(data.read())


def reader_of(path: str) -> Callable[[bytes], str] | None:
    """What turns the bytes of a packaged file into text, or None where it holds no prose."""
    bare = PurePosixPath(path)
    packed = bare.suffix in {".gz", ".dz"}
    if packed:
        bare = bare.with_suffix("")
    suffix = bare.suffix
    if re.fullmatch(r"\.[a-z]{2}(?:[-_.][A-Za-z]+)?", suffix) and bare.with_suffix("").suffix == ".html":
        suffix = ".html"  # Apache's manual: index.html.de
    if "/_sources/" in path or bare.name.startswith(("genindex", "search", "changelog")):
        return None
    strip: Callable[[str], str]
    if _MANUAL_PAGE.search(path):
        strip = text_of_manual
    elif suffix in {".html", ".htm", ".xhtml"}:
        strip = text_of_html
    elif suffix in TEXT_SUFFIXES:
        strip = str
    else:
        return None

    def text_of(data: bytes) -> str:
        try:
            return strip((gzip.decompress(data) if packed else data).decode("utf-8"))
        except (UnicodeDecodeError, OSError, EOFError, zlib.error):
            return ""

    return text_of


# -- documents -------------------------------------------------------------------------------------


def paragraphs(text: str) -> Iterator[str]:
    """What stands between empty lines; where that is too long, as in a dictionary, so many lines of it."""
    for paragraph in map(str.rstrip, _PARAGRAPHS.split(text)):
        if len(paragraph) <= LONGEST_PARAGRAPH:
            if paragraph:
                yield paragraph
            continue
        lines = paragraph.split("\n")
        for start in range(0, len(lines), LINES_OF_LONG):
            yield "\n".join(lines[start : start + LINES_OF_LONG])


class Documents:
    """Texts without the paragraphs that came before, cut to the lengths of web documents."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._random = random.Random(SEED)

    def of(self, text: str) -> Iterator[str]:
        document: list[str] = []
        left = self._length()
        for paragraph in paragraphs(text):
            if not self._is_new(paragraph):
                continue
            document.append(paragraph)
            left -= len(paragraph)
            if left <= 0:
                yield "\n\n".join(document)
                document, left = [], self._length()
        if document:
            yield "\n\n".join(document)

    def _is_new(self, paragraph: str) -> bool:
        digest = hashlib.blake2b(paragraph.strip().encode("utf-8", "replace"), digest_size=8).digest()
        known = digest in self._seen
        self._seen.add(digest)
        return not known

    def _length(self) -> float:
        return self._random.lognormvariate(math.log(MEDIAN_CHARACTERS), LOG_SPREAD)


def gathered(sources: Iterable[tuple[str, Iterator[str]]], bytes_wanted: int) -> tuple[list[bytes], Counter]:
    """UTF-8 documents of the sources in order, until there are enough, and the bytes from each source."""
    documents = Documents()
    result: list[bytes] = []
    bytes_of: Counter = Counter()
    for name, texts in sources:
        bytes_of[name] = 0
        for text in texts:
            for document in documents.of(text):
                data = document.encode("utf-8", "replace")
                result.append(data)
                bytes_of[name] += len(data)
            if bytes_of.total() >= bytes_wanted:
                return result, bytes_of
    return result, bytes_of


def sources_of(kind: str, packages: Path | None) -> list[tuple[str, Iterator[str]]]:
    """Where the text of a kind comes from, in order. Nothing is read or fetched before it is asked for."""

    def debian(names: list[str], *, translations: bool = False) -> Iterator[str]:
        return debian_texts(names, packages, translations=translations) if packages else iter(())

    shared = ("shared test data", shared_texts())
    python = ("Python's documentation", python_texts(code=False))
    prose = ("Debian's documentation", debian(PROSE))
    api = ("Debian's API documentation", debian(API))
    if kind == "english":
        return [shared, prose, python, api]
    if kind == "code":
        return [("Python's source files", python_texts(code=True)), api]
    translated = ("Debian's translations", debian(MULTILINGUAL, translations=True))
    return [translated, shared, prose, api, python]


# -- files -----------------------------------------------------------------------------------------


def write_corpus(documents: list[bytes], out: Path, held_out_bytes: int, bytes_wanted: int) -> None:
    """Held-out documents, then shards, from shuffled documents. Older files of the folder are replaced."""
    random.Random(SEED).shuffle(documents)
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("shard_*.parquet"), *out.glob("held_out.parquet")]:
        old.unlink()
    rest = iter(documents)
    write_parquet(taken(rest, held_out_bytes), out / "held_out.parquet")
    left, number = bytes_wanted, 0
    while left > 0 and (shard := taken(rest, min(left, SHARD_BYTES))):
        write_parquet(shard, out / f"shard_{number:05}.parquet")
        left -= sum(map(len, shard))
        number += 1


def taken(documents: Iterator[bytes], bytes_wanted: int) -> list[bytes]:
    """Documents from an iterator until they hold as much as is wanted, or it is empty."""
    result: list[bytes] = []
    size_bytes = 0
    while size_bytes < bytes_wanted and (document := next(documents, None)) is not None:
        result.append(document)
        size_bytes += len(document)
    return result


def write_parquet(documents: list[bytes], path: Path) -> None:
    """With the settings of nanochat's shards."""
    table = pa.table({"text": pa.array(documents, pa.binary()).cast(pa.string())})
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP,
        use_dictionary=False,
        compression="zstd",
        compression_level=3,
        write_statistics=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=300, help="text to gather (UTF-8)")
    parser.add_argument("--kind", choices=["english", "multilingual", "code"], default="english")
    parser.add_argument("--held-out", type=int, default=10, help="megabytes more, for held_out.parquet")
    parser.add_argument("--debian", action="store_true", help="also fetch Debian's documentation packages")
    parser.add_argument(
        "--packages", type=Path, default=ROOT / "data/bpe_corpus/debian", help="where to keep them"
    )
    parser.add_argument("--out", type=Path, help="folder (default: data/bpe_corpus/KIND)")
    arguments = parser.parse_args()
    out = arguments.out or ROOT / "data/bpe_corpus" / arguments.kind
    packages = arguments.packages if arguments.debian else None
    held_out_bytes, bytes_wanted = arguments.held_out * 10**6, arguments.megabytes * 10**6
    sources = sources_of(arguments.kind, packages)
    documents, bytes_of = gathered(sources, held_out_bytes + bytes_wanted)
    if not documents:
        print("no text was found: see --help for what it is gathered from", file=sys.stderr)
        return 1
    write_corpus(documents, out, held_out_bytes, bytes_wanted)
    megabytes = {name: round(size_bytes / 1e6, 1) for name, size_bytes in bytes_of.items()}
    print(json.dumps({"out": str(out), "documents": len(documents), "megabytes": megabytes}))
    if bytes_of.total() < held_out_bytes + bytes_wanted:
        print(f"only {bytes_of.total() / 1e6:.0f} MB were found", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
