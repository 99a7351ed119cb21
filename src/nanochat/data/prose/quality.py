"""Which text of an installation is worth reading: cleaning, cutting, and what is left out.

Docstrings are written by people, but not all of them are prose: there are licences, tables that a
program printed, pages of interpreter sessions, names in other alphabets. The rules are few and
counted on characters, so that they give the same answer on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MIN_CHARS = 40
MIN_WORDS = 5
MAX_CHARS = 6_000

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffd]")
_BLANK_LINES = re.compile(r"\n{3,}")
_TRAILING = re.compile(r"[ \t]+\n")
# A line that is only a template's place holder: `{input}`, `%(kwargs)s`, `@signature@`.
_PLACEHOLDER_LINE = re.compile(r"^[ \t]*(?:\{\w*\}|%\(\w[\w:]*\)s|@\w+@)[ \t]*\n?", re.MULTILINE)
_LICENCE = (
    "permission is hereby granted",
    "licensed under the",
    "redistribution and use in source",
    'provided "as is"',
    "provided 'as is'",
    "provided as is",
    "general public license",
    "all rights reserved",
    "spdx-license",
    "copyright (c)",
    "copyright ©",
)
_WORD = re.compile(r"[A-Za-z]{2,}")
# The commonest words of English prose, beyond those that are also words of Python.
_PROSE = (
    "the of a an to be is are this that it which will when can by on at if in for with from as and or not"
)
_ENGLISH = frozenset(_PROSE.split(" "))
_SESSION = re.compile(r"^[ \t]*(?:>>>|\.\.\. ?)", re.MULTILINE)


def documents(text: str) -> Iterator[tuple[int, str]]:
    """(part, document) of a text: cleaned, cut, and only what is prose."""
    for part, piece in enumerate(cut(clean(text))):
        if is_prose(piece):
            yield part, piece


def clean(text: str) -> str:
    """One spelling of white space, no control characters, no lines that are a template's place holder."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    text = _CONTROL.sub("", text)
    text = _PLACEHOLDER_LINE.sub("", text)
    text = _TRAILING.sub("\n", text + "\n")
    return _BLANK_LINES.sub("\n\n", text).strip()


def is_prose(text: str) -> bool:
    """Whether cleaned text is English prose or documentation worth learning from."""
    if len(text) < MIN_CHARS or not _encodable(text):
        return False
    words = _WORD.findall(text)
    if len(words) < MIN_WORDS:
        return False
    lower = text.lower()
    if any(phrase in lower for phrase in _LICENCE):
        return False
    packed = "".join(text.split())
    solid = len(packed)
    ascii_solid = len(packed.encode("ascii", "ignore"))
    letters = sum(len(word) for word in words)
    if ascii_solid < 0.95 * solid or letters < 0.55 * solid:
        return False
    if len(text) > 300 and sum(word.lower() in _ENGLISH for word in words) < 0.06 * len(words):
        return False
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 20 and len(set(lines)) < 0.6 * len(lines):
        return False
    return len(text) < 1_000 or session_share(text) <= 0.4


def session_share(text: str) -> float:
    """The share of non-blank lines that belong to an interpreter session: prompts and what they printed."""
    if not _SESSION.search(text):
        return 0.0
    lines = total = 0
    inside = False
    for line in text.split("\n"):
        if not line.strip():
            inside = False
            continue
        inside = inside or line.lstrip().startswith(">>>")
        total += 1
        lines += inside
    return lines / total


def cut(text: str, max_chars: int = MAX_CHARS) -> list[str]:
    """`text` in pieces of at most `max_chars`: between paragraphs, else lines, else anywhere."""
    if len(text) <= max_chars:
        return [text]
    for separator in ("\n\n", "\n"):
        pieces = _packed(text.split(separator), separator, max_chars)
        if all(len(piece) <= max_chars for piece in pieces):
            return pieces
    return [text[start : start + max_chars] for start in range(0, len(text), max_chars)]


def _packed(parts: list[str], separator: str, max_chars: int) -> list[str]:
    """Neighbouring parts joined as long as they fit; a part that is too long alone stays alone."""
    pieces = [parts[0]]
    for part in parts[1:]:
        joined = f"{pieces[-1]}{separator}{part}"
        if len(joined) <= max_chars:
            pieces[-1] = joined
        else:
            pieces.append(part)
    return pieces


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
