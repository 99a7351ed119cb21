"""Digest of a stage's source files, and the code's revision: recorded in receipts, never identity.

A comment must not make a $100 checkpoint stale, so the digest enters no fingerprint. It is of the
code without comments and docstrings; a lock file of these digests (tests/golden/stage_sources.json)
fails a test when code changed and nobody said whether its meaning did.
"""

from __future__ import annotations

import ast
import io
import os
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

from nanochat.store.digests import digest_json

_PACKAGE = Path(__file__).parent


def sources_digest(sources: tuple[str, ...]) -> str:
    """Digest of the Python modules and folders of Python and Rust named (relative to this package)."""
    files: list[Path] = []
    for name in sources:
        path = _PACKAGE / name
        files += sorted((*path.rglob("*.py"), *path.rglob("*.rs"))) if path.is_dir() else [path]
    return digest_json({os.path.relpath(file, _PACKAGE): _meaning(file) for file in files})


def _meaning(file: Path) -> str:
    """The source without comments, docstrings and blank lines: the same text on every Python version."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".rs":
        lines = [line.rstrip() for line in source.splitlines()]
        return "\n".join(line for line in lines if line and not line.lstrip().startswith("//"))
    lines = source.splitlines()
    for number in _docstring_lines(ast.parse(source)):
        lines[number - 1] = ""
    of_strings: set[int] = set()  # lines whose ends lie inside a string: blanks there are its content
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (last_row, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.type in _STRINGS and lines[row - 1]:
            of_strings.update(range(row, last_row))
    kept = []
    for row, line in enumerate(lines, start=1):
        if row in of_strings or row - 1 in of_strings:
            kept.append(line if row in of_strings else line.rstrip())
        elif line.strip():
            kept.append(line.rstrip())
    return "\n".join(kept)


# Since Python 3.12 an f-string is several tokens, its text between the fields FSTRING_MIDDLE.
_STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)


def code_revision(root: Path) -> str | None:
    """The commit of the checkout, with ``+`` where files differ from it; None outside of git."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")
