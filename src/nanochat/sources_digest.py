"""Digest of a stage's source files, and the code's revision: recorded in receipts, never identity.

A comment must not make a $100 checkpoint stale, so the digest enters no fingerprint. It is of the
code without comments and docstrings; a lock file of these digests (tests/golden/stage_sources.json)
fails a test when code changed and nobody said whether its meaning did.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

from nanochat.store.digests import digest_json

_PACKAGE = Path(__file__).parent


def sources_digest(sources: tuple[str, ...]) -> str:
    """Digest of the modules and folders named (relative to this package)."""
    files: list[Path] = []
    for name in sources:
        path = _PACKAGE / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return digest_json({file.relative_to(_PACKAGE).as_posix(): _meaning(file) for file in files})


def _meaning(file: Path) -> str:
    """The source without comments, docstrings and blank lines: the same text on every Python version."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    for number in _docstring_lines(ast.parse(source)):
        lines[number - 1] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


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
