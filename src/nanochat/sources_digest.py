"""Digest of a stage's source files, and the code's revision: recorded in receipts, never identity.

A comment must not make a $100 checkpoint stale, so the digest enters no fingerprint. It is of the
parsed code without comments and docstrings; a lock file of these digests fails a test when code
changed and nobody said whether its meaning did.
"""

from __future__ import annotations

import ast
import subprocess
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
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


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
