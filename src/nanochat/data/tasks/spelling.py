"""Spelling: the published SimpleSpelling, and a form that a very small vocabulary can learn.

`simple_spelling` answers ``apple:a,p,p,l,e`` (nanochat, October 2025). `simple_spelling_small`
answers `` a p p l e``: each letter has a space before it, so it is the same token wherever it
stands, and a few hundred pairs of tokens fewer have to be learned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from nanochat.data.conversations import Conversation, exchange
from nanochat.data.tasks.context import TaskContext, TaskError
from nanochat.data.tasks.splits import Split, split_of_word
from nanochat.data.tasks.task import generated

# The commonest words of its own text are what a small model can be expected to take apart: a rare
# word is many tokens, each seen a few times.
SMALL_WORDS = 6_000

SMALL_TEMPLATES = (
    "Spell the word: {word}",
    "Spell the word {word}.",
    "Spell {word}.",
    "Spell {word}",
    "How do you spell {word}?",
    "How is the word {word} spelled?",
    "Can you spell {word}?",
    "Please spell {word}.",
    "Spell {word} letter by letter.",
    "What are the letters of {word}?",
)


def words_of(context: TaskContext, split: Split, limit: int | None = None) -> list[str]:
    """The words of one split among the `limit` commonest. Raises TaskError where there are none."""
    chosen = [word for word in context.words()[:limit] if split_of_word(word) == split]
    if not chosen:
        raise TaskError(
            f"the training text has too few words ({len(context.words())}) for split {split!r} "
            "of the spelling tasks"
        )
    return chosen


def spelled(word: str) -> str:
    """The word as the small model writes it: ``" w o r d"``."""
    return "".join(f" {letter}" for letter in word)


def _generate(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    words = words_of(context, split)
    for _ in range(rows):
        word = numbers.choice(words)
        yield exchange(f"Spell the word: {word}", f"{word}:{','.join(word)}")


def _generate_small(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    words = words_of(context, split, SMALL_WORDS)
    for _ in range(rows):
        word = numbers.choice(words)
        question = numbers.choice(SMALL_TEMPLATES).format(word=word)
        if numbers.random() < 0.2:
            question = question.lower()
        yield exchange(question, spelled(word))


def corpus_inputs(task: str, context: TaskContext) -> dict[str, str]:
    """The digest of the text that words or documents come from."""
    return {
        "corpus": context.require_corpus_digest(task),
        "words": f"{context.min_word_count}/{context.max_word_chars}",
    }


def _inputs(context: TaskContext) -> dict[str, str]:
    return corpus_inputs("spelling", context)


SIMPLE_SPELLING = generated(name="simple_spelling", version=1, make=_generate, inputs=_inputs)
SIMPLE_SPELLING_SMALL = generated(
    name="simple_spelling_small", version=1, make=_generate_small, inputs=_inputs
)
