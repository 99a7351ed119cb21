"""Multiple-choice questions made from the offline documents, in MMLU's and in ARC's schema.

Facts are out of reach of a model of a million parameters, so these ask for reading: a piece of
documentation is quoted, and one of the choices is a word of it. The other choices are words of
other sentences, drawn in the same way, so that neither frequency nor length gives the answer away.
MMLU's stand-in quotes up to ten words and has four choices, ARC-Easy's two to four words and three
choices. Questions for testing come from modules that no training question quotes, and a sentence
that stands in several modules is quoted in one split alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from nanochat.data.conversations import Conversation
from nanochat.data.questions import Question, to_conversation
from nanochat.data.tasks.context import TaskContext, TaskError
from nanochat.data.tasks.docstring_chat import document_task, documented
from nanochat.data.tasks.splits import SPLITS, Split
from nanochat.data.tasks.task import Task, generator_of

# Words that every sentence has are no choice; rarer ones are several tokens of a small vocabulary.
_COMMONEST, _RAREST = 40, 1_500
_QUESTIONS = 400
_FEWEST_CHOICES_WORDS = 20
_WORD = re.compile(r"([a-z]{4,12})[,.;:]?")
# What every prompt says anyway, around the quotation and in both wordings, is no choice either.
_FRAME = frozenset(
    {"multiple", "choice", "question", "which", "word", "words", "this", "these", "text"}
    | {"respond", "only", "with", "letter", "correct", "answer"}
)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How a family of questions is worded, how many words it quotes, and how many choices it has."""

    task: str
    wording: str
    fewest_words: int
    most_words: int
    choices: int
    with_subject: bool


@dataclass(frozen=True, slots=True)
class _Sentence:
    """words: as they stand in the text. candidates: places of the words that may be a choice."""

    words: tuple[str, ...]
    candidates: tuple[int, ...]
    source: str
    where: str

    def candidate(self, place: int) -> str:
        return self.words[place].rstrip(",.;:")


def _sentences(context: TaskContext, split: Split) -> list[_Sentence]:
    """The sentences of a split's modules, each once; training has first claim to a sentence."""
    eligible = frozenset(context.words()[_COMMONEST:_RAREST]) - _FRAME
    earlier = SPLITS[: SPLITS.index(split)]
    taken = {text.casefold() for other in earlier for _, text in documented(context, other)}
    found = []
    for document, text in documented(context, split):
        if text.casefold() in taken:
            continue
        taken.add(text.casefold())
        words = tuple(text.split(" "))
        # Not the first word: with its capital it is another token than the choice.
        places = tuple(
            place
            for place, word in enumerate(words)
            if place and (match := _WORD.fullmatch(word)) and match[1] in eligible
        )
        if places:
            where = f"{document.module}.{document.name}" if document.name else document.module
            found.append(_Sentence(words, places, document.source, where))
    return found


def _make(
    form: _Form, id: str, sentence: _Sentence, pool: list[_Sentence], numbers: random.Random
) -> Question:
    letters = tuple("ABCD"[: form.choices])
    place = numbers.choice(sentence.candidates)
    right = sentence.candidate(place)
    length = numbers.randint(form.fewest_words, form.most_words)
    start = max(0, min(place - numbers.randrange(length), len(sentence.words) - length))
    quoted = " ".join(sentence.words[start : start + length]).rstrip(",.;:")
    present = " ".join(sentence.words).lower()
    wrong: list[str] = []
    while len(wrong) < form.choices - 1:
        other = numbers.choice(pool)
        word = other.candidate(numbers.choice(other.candidates))
        if word not in present and word not in wrong:
            wrong.append(word)
    position = numbers.randrange(form.choices)
    return Question(
        id=id,
        question=form.wording.format(text=quoted),
        choices=(*wrong[:position], right, *wrong[position:]),
        letters=letters,
        answer=letters[position],
        subject=sentence.source if form.with_subject else None,
    )


def _pool(form: _Form, context: TaskContext, split: Split) -> list[_Sentence]:
    pool = context.keep(("sentences", split), lambda: _sentences(context, split))
    words = {sentence.candidate(place) for sentence in pool for place in sentence.candidates}
    if len(words) < _FEWEST_CHOICES_WORDS:
        raise TaskError(
            f"task {form.task!r}: the offline documents have too little prose for split {split!r} "
            f"({len(pool)} sentences, {len(words)} words to choose from)"
        )
    return pool


def _generate(
    form: _Form, context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    pool = _pool(form, context, split)
    for index in range(rows):
        yield to_conversation(_make(form, f"{split}/{index}", numbers.choice(pool), pool, numbers))


def _questions(form: _Form, context: TaskContext, split: Split) -> list[Question]:
    """At most 400, each about another sentence; always the same ones."""
    pool = _pool(form, context, split)
    numbers = generator_of(f"{form.task}/questions", split, 0)
    chosen = numbers.sample(pool, min(_QUESTIONS, len(pool)))
    return [
        _make(form, f"{form.task}/{split}/{index}/{sentence.where}", sentence, pool, numbers)
        for index, sentence in enumerate(chosen)
    ]


def _task(form: _Form) -> Task:
    return document_task(form.task, 2, partial(_generate, form), partial(_questions, form))


OFFLINE_MMLU = _task(
    _Form(
        task="offline_mmlu",
        wording="Which word is in this text? {text}",
        fewest_words=5,
        most_words=10,
        choices=4,
        with_subject=True,
    )
)
OFFLINE_ARC_EASY = _task(
    _Form(
        task="offline_arc_easy",
        wording="Which of these words is in: {text}?",
        fewest_words=2,
        most_words=4,
        choices=3,
        with_subject=False,
    )
)
