"""Counting a letter in a word: the published SpellingBee, and two short forms of it.

`spelling_bee` spells the word, counts by index, and then checks itself with a calculator call
(the form of nanochat, October 2025, in our own words). `letter_count_tool` calls the calculator
at once; word and letter stand in quotes in the question and in the call, with the same space
before them, so that the call is a copy of the question's tokens. `letter_count_by_hand` writes the
running count behind every letter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from nanochat.data.conversations import Conversation, Part, exchange
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.spelling import SMALL_WORDS, corpus_inputs, words_of
from nanochat.data.tasks.splits import Split
from nanochat.data.tasks.task import generated

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"

_BEE_TEMPLATES = (
    "How many {letter} are in the word {word}",
    "How many {letter} are in {word}",
    "How many {letter} are there in {word}",
    "Count the number of {letter} in {word}",
    "Count the {letter} in {word}",
    "How often does {letter} occur in {word}",
    "How many times does {letter} appear in {word}",
    "How many times does the letter {letter} appear in the word {word}",
    "What is the number of {letter} in {word}",
    "In the word {word}, how many {letter} are there",
    "Tell me how many {letter} the word {word} has",
    "Number of {letter} in {word}",
    "In {word}, count {letter}",
    "Could you count the letter {letter} in {word}",
)

# The letter and the word in quotes, each with a space before its quotation mark.
QUOTED_TEMPLATES = (
    'How many times does "{letter}" occur in "{word}"?',
    'How many times does the letter "{letter}" occur in "{word}"?',
    'How many times does "{letter}" appear in "{word}"?',
    'How many "{letter}" are in "{word}"?',
    'How many "{letter}" are there in the word "{word}"?',
    'How often is "{letter}" in "{word}"?',
    'Count the letter "{letter}" in "{word}".',
    'Count "{letter}" in "{word}".',
    'In the word "{word}", how many "{letter}" are there?',
    'How many {letter}\'s are in "{word}"?',
    'How many times does the letter {letter} appear in "{word}"?',
)
_PLAIN_TEMPLATES = (
    "How many times does {letter} occur in {word}?",
    "How many times does the letter {letter} appear in {word}?",
    "How many {letter} are in {word}?",
    "How many {letter}'s are in {word}?",
    "Count the letter {letter} in {word}.",
)
_PLAIN_SHARE = 0.2
HAND_TEMPLATES = (
    "Count the letter {letter} in {word} by hand.",
    "Without Python, how many {letter} are in {word}?",
    "Spell {word} and count the letter {letter}.",
    "Count {letter} in {word} letter by letter.",
)


def count_call(word: str, letter: str) -> str:
    """The calculator call. It begins with a space: `` "`` is then one token, as in the question."""
    return f' "{word}".count("{letter}")'


def pick_letter(word: str, numbers: random.Random) -> str:
    """Mostly a letter of the word, now and then any letter, so that 0 is an answer too."""
    return numbers.choice(word if numbers.random() < 0.85 else _ALPHABET)


def hand_count(word: str, letter: str) -> str:
    """`` t0 e1 n1 e2``: every letter with the number of `letter` so far."""
    count = 0
    trace = []
    for character in word:
        count += character == letter
        trace.append(f" {character}{count}")
    return "".join(trace)


def _bee_answer(word: str, letter: str) -> tuple[Part, ...]:
    lines = [
        f"We want to know how often '{letter}' stands in '{word}'. First, spell the word:",
        f"{word}:{','.join(word)}",
        "",
        f"Now go through it and count every '{letter}':",
    ]
    count = 0
    for index, character in enumerate(word, start=1):
        count += character == letter
        lines.append(f"{index}:{character}" + (f" found, count={count}" if character == letter else ""))
    lines += ["", f"By hand that makes {count}.", "", "To be sure, ask Python:", ""]
    return (
        Part("text", "\n".join(lines)),
        Part("python", f"'{word}'.count('{letter}')"),
        Part("python_output", str(count)),
        Part("text", f"\n\nPython says {count}, so the answer is:\n\n#### {count}"),
    )


def _generate_bee(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    words = words_of(context, split)
    for _ in range(rows):
        word = numbers.choice(words)
        letter = pick_letter(word, numbers)
        template = numbers.choice(_BEE_TEMPLATES)
        if numbers.random() < 0.3:
            template = template.lower()
        letter_quote, word_quote = (numbers.choice(("", "'", '"')) for _ in range(2))
        question = template.format(
            letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}"
        )
        if numbers.random() < 0.5:
            question += "?"
        yield exchange(question, _bee_answer(word, letter))


def _generate_tool(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    words = words_of(context, split, SMALL_WORDS)
    for _ in range(rows):
        word = numbers.choice(words)
        letter = pick_letter(word, numbers)
        plain = numbers.random() < _PLAIN_SHARE
        template = numbers.choice(_PLAIN_TEMPLATES if plain else QUOTED_TEMPLATES)
        count = str(word.count(letter))
        yield exchange(
            template.format(word=word, letter=letter),
            (
                Part("python", count_call(word, letter)),
                Part("python_output", count),
                Part("text", f"The answer is {count}."),
            ),
        )


def _generate_hand(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    words = words_of(context, split, SMALL_WORDS)
    for _ in range(rows):
        word = numbers.choice(words)
        letter = pick_letter(word, numbers)
        question = numbers.choice(HAND_TEMPLATES).format(word=word, letter=letter)
        yield exchange(question, f"{hand_count(word, letter)}. The answer is {word.count(letter)}.")


def _inputs(context: TaskContext) -> dict[str, str]:
    return corpus_inputs("letter counts", context)


SPELLING_BEE = generated(name="spelling_bee", version=1, make=_generate_bee, inputs=_inputs)
LETTER_COUNT_TOOL = generated(name="letter_count_tool", version=1, make=_generate_tool, inputs=_inputs)
LETTER_COUNT_BY_HAND = generated(name="letter_count_by_hand", version=1, make=_generate_hand, inputs=_inputs)
