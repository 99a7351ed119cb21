"""Questions about functions, answered with the first sentence of their documentation.

It keeps prose in the small model's conversations. Nothing here can be looked up or copied, so the
answers of a small model are fluent and mean nothing; no target is set on them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial

from nanochat.data.conversations import Conversation, exchange
from nanochat.data.questions import Question
from nanochat.data.tasks.context import Document, TaskContext, TaskError
from nanochat.data.tasks.spelling import corpus_inputs
from nanochat.data.tasks.splits import Split, split_of_module
from nanochat.data.tasks.task import Task, generated

_MAX_CHARS = 160
_MIN_WORDS = 4
_SENTENCE_END = re.compile(r"(?<=[a-z)\]`'\"][.!?])(?<!e\.g\.)(?<!i\.e\.)\s")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z][A-Za-z0-9_]*)?\Z")

_FUNCTION_TEMPLATES = (
    "What does {name} do?",
    "What is {name} for?",
    "Tell me about {name}.",
    "Explain {name}.",
)
_MODULE_TEMPLATES = ("What is the module {name}?", "What is {name} for?", "Tell me about the module {name}.")


def first_sentence(text: str) -> str | None:
    """The first sentence of a documentation text on one line; None where it is no short prose."""
    paragraph = _PARAGRAPH_END.split(text.strip(), maxsplit=1)[0]
    sentence = " ".join(_SENTENCE_END.split(paragraph, maxsplit=1)[0].split())
    if not 20 <= len(sentence) <= _MAX_CHARS or sentence.count(" ") < _MIN_WORDS - 1:
        return None
    if not sentence[0].isalpha() or not sentence.isascii() or ">>>" in sentence or "--" in sentence:
        return None
    return sentence if sentence[-1] in ".!?" else sentence.rstrip(" :;,") + "."


def documented(context: TaskContext, split: Split) -> list[tuple[Document, str]]:
    """(document, its first sentence) of the named docstrings of one split's modules.

    Raises TaskError where there are none.
    """
    return context.keep(("documented", split), lambda: _documented(context, split))


def _documented(context: TaskContext, split: Split) -> list[tuple[Document, str]]:
    found = []
    for document in context.documents():
        if document.kind != "docstring" or document.part or split_of_module(document.module) != split:
            continue
        name = document.name or document.module
        if not _NAME.match(name) or "__" in name:
            continue
        sentence = first_sentence(document.text)
        if sentence:
            found.append((document, sentence))
    if not found:
        raise TaskError(f"the offline documents have no docstrings for split {split!r}")
    return found


def _generate(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    pool = documented(context, split)
    for _ in range(rows):
        document, sentence = numbers.choice(pool)
        templates = _FUNCTION_TEMPLATES if document.name else _MODULE_TEMPLATES
        name = document.name or document.module
        yield exchange(numbers.choice(templates).format(name=name), sentence)


def _inputs(task: str, context: TaskContext) -> dict[str, str]:
    context.require_documents(task)
    return corpus_inputs(task, context)


def document_task(
    name: str,
    version: int,
    make: Callable[[TaskContext, Split, int, random.Random], Iterator[Conversation]],
    questions: Callable[[TaskContext, Split], list[Question]] | None = None,
) -> Task:
    """A task that is made from the offline documents."""
    return generated(
        name=name,
        version=version,
        make=make,
        inputs=partial(_inputs, name),
        questions=questions,
        check=lambda context: context.require_documents(name),
    )


DOCSTRING_CHAT = document_task("docstring_chat", 1, _generate)
