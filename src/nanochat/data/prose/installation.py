"""What an installation has to read: the standard library's files, the packages', their READMEs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from nanochat.data.prose.quality import documents

PYTHON = "python"

# Dependencies of this project (direct ones and theirs, on every platform), all pinned in
# requirements.lock, in the order in which they are taken until the corpus is full. sympy is left
# out: it is a sixth of the work of reading, and much of it is interpreter sessions.
PACKAGES = (
    "numpy",
    "torch",
    "networkx",
    "matplotlib",
    "sqlalchemy",
    "dagster",
    "dagster-shared",
    "dagster-pipes",
    "dagster-graphql",
    "dagster-dg-core",
    "dagster-dg-cli",
    "huggingface-hub",
    "pydantic",
    "pydantic-core",
    "pyarrow",
    "mpmath",
    "pillow",
    "setuptools",
    "packaging",
    "click",
    "rich",
    "jinja2",
    "mako",
    "alembic",
    "fsspec",
    "universal-pathlib",
    "filelock",
    "platformdirs",
    "watchdog",
    "requests",
    "urllib3",
    "httpx",
    "anyio",
    "uvicorn",
    "yarl",
    "grpcio",
    "protobuf",
    "graphql-core",
    "gql",
    "prompt-toolkit",
    "fonttools",
    "tqdm",
    "pyparsing",
    "python-dateutil",
    "structlog",
    "jsonschema",
    "tiktoken",
    "safetensors",
)

# Tests, other people's code that was copied in, and files that a program wrote.
_TESTS = ("test", "tests", "testing", "_testing")
_COPIES = ("_vendor", "_vendored", "vendor", "vendored", "third_party", "site-packages", "dist-packages")
_GENERATED = ("__pycache__", "encodings", "pydoc_data", "_generated", "ensurepip", "lib2to3")
_SKIPPED_FOLDERS = frozenset((*_TESTS, *_COPIES, *_GENERATED))
# Where a README stops being about the software.
_README_END = re.compile(
    r"^(?:#+ *|)(?:change ?log|changes|release notes|release history|history|license|licence|contributors|"
    r"sponsors|authors|acknowledge?ments|citation|citing)\b.*$",
    re.IGNORECASE | re.MULTILINE,
)
_HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_README_NOISE = re.compile(
    r"^.*(?:\[!\[|!\[|<img|<a |</|<p|<div|\.\. image::|:target:|:alt:|shields\.io|badge).*$\n?", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A Python file and the dotted name of its module."""

    path: str
    module: str


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where documents come from: the standard library, or one installed package."""

    name: str
    version: str
    files: tuple[SourceFile, ...]
    readme: str = ""
    topics: tuple[tuple[str, str], ...] = ()

    def other_documents(self) -> Iterator[tuple[str, str, str, int, str]]:
        """(module, name, kind, part, text) of what is not a docstring."""
        for topic, text in self.topics:
            for part, piece in documents(text):
                yield f"pydoc_data.topics.{topic}", topic, "topic", part, piece
        for part, piece in documents(_readme_prose(self.readme)):
            yield f"{self.name}/README", "", "readme", part, piece


def origins() -> list[Origin]:
    """The standard library and those of `PACKAGES` that are installed, in corpus order."""
    found = [
        Origin(
            PYTHON,
            platform.python_version(),
            tuple(_standard_library()),
            topics=tuple(sorted(pydoc_data.topics.topics.items())),
        )
    ]
    for name in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        metadata = distribution.metadata.json
        readme = str(metadata.get("description", ""))
        found.append(Origin(name, distribution.version, tuple(_package_files(distribution)), readme=readme))
    return found


def _standard_library() -> Iterator[SourceFile]:
    top = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            relative = PurePosixPath(path.relative_to(top).as_posix())
            if _is_read(relative):
                yield SourceFile(str(path), _module_name(relative))


def _package_files(distribution: importlib.metadata.Distribution) -> Iterator[SourceFile]:
    for file in sorted(distribution.files or (), key=str):
        if _is_read(file):
            yield SourceFile(str(distribution.locate_file(file)), _module_name(file))


def _is_read(file: PurePosixPath) -> bool:
    folders = file.parts[:-1]
    return (
        file.suffix == ".py"
        and not _SKIPPED_FOLDERS.intersection(folders)
        and not file.name.startswith("test_")
        and all(part.isidentifier() for part in folders)
    )


def _module_name(file: PurePosixPath) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _readme_prose(readme: str) -> str:
    """A README without badges, pictures and HTML, up to its change log or credits."""
    if readme.strip() == "UNKNOWN":
        return ""
    readme = _HTML_COMMENT.sub("", readme)
    end = _README_END.search(readme)
    return _README_NOISE.sub("", readme[: end.start()] if end else readme)
