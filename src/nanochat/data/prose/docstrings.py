"""Docstrings of Python files, read without importing them.

Run as a program this is one worker of the gathering: a JSON list of paths comes in on
stdin; for every file, in order, a JSON line ``[[name, part, text], …]`` goes out on stdout. It is a
process of its own, not a thread (parsing holds the interpreter lock) and not a fork (an
orchestrator's process has threads and a gRPC server that do not survive one).
"""

from __future__ import annotations

import ast
import gc
import inspect
import json
import sys
import warnings
from collections.abc import Iterator

from nanochat.data.prose.quality import documents

# Functions that attach a docstring to an object written in C: torch's and numpy's.
_ATTACHERS = ("add_docstr", "add_docstr_all", "add_newdoc")


def read_file(path: str) -> list[tuple[str, int, str]]:
    """(qualified name, part, text) of what a file documents. The module itself has the name ""; a
    docstring too long for one document has several parts.

    A file that cannot be read or parsed as this Python's source documents nothing: packages ship
    templates and files for other versions.
    """
    try:
        with open(path, "rb") as file:
            source = file.read()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [
        (name, part, text) for name, docstring in _documented(tree, "") for part, text in documents(docstring)
    ]


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
    for child in _statements(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}" if name else child.name)
        elif isinstance(child, ast.Expr | ast.Assign):
            if isinstance(child.value, ast.Call):
                yield from _attached(child.value)
        else:
            yield from _documented(child, name)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements directly inside a compound statement, its handlers and cases included."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        value = getattr(node, field, None)
        if isinstance(value, list):
            yield from value


def _attached(call: ast.Call) -> Iterator[tuple[str, str]]:
    """`add_docstr(torch.abs, "…")` and its relatives: the object's name and the docstring."""
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called.lstrip("_") not in _ATTACHERS or not call.args:
        return
    strings = [
        node.value
        for argument in call.args
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    docstring = next((text for text in strings if " " in text.strip()), None)
    if docstring is None:
        return
    name = ast.unparse(call.args[0]) if not isinstance(call.args[0], ast.Constant) else ""
    name = name or ".".join(text for text in strings if text.isidentifier())
    # Docstrings that are format templates double their braces.
    yield name, inspect.cleandoc(docstring.replace("{{", "{").replace("}}", "}"))


def main() -> None:
    gc.disable()  # syntax trees have no cycles; collecting costs a third of the time
    for path in json.load(sys.stdin):
        sys.stdout.write(json.dumps(read_file(path)) + "\n")


if __name__ == "__main__":
    main()
