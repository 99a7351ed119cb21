"""Questions that the small model has never been trained on, and what counts as a right answer.

They are the measure of the `quick` recipe: 20 paraphrases of the question for its name, and words,
sums and stories that the generators of `nanochat.data.tasks` hold out by hash. For the calculator
the *expression* of the call is judged, not the answer: most words hold the letter asked for once,
so always answering "1" would be right two times in three.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from nanochat.data.conversations import Conversation, Message
from nanochat.data.tasks.arithmetic import (
    DIRECT_TEMPLATES,
    PROBLEM_TEMPLATES,
    ask_sum,
    number_pools,
    pairs_of,
    write_problem,
)
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.letter_counts import (
    HAND_TEMPLATES,
    QUOTED_TEMPLATES,
    count_call,
    hand_count,
    pick_letter,
)
from nanochat.data.tasks.name_paraphrases import NAME_PARAPHRASES
from nanochat.data.tasks.spelling import SMALL_TEMPLATES, SMALL_WORDS, spelled, words_of

Skill = Literal["name", "sums", "letter_counts", "spelling", "word_problems", "hand_counts", "direct_sums"]
SKILLS: tuple[Skill, ...] = get_args(Skill)

_CALLS: frozenset[Skill] = frozenset({"sums", "letter_counts", "word_problems"})


@dataclass(frozen=True, slots=True)
class HeldOutQuestion:
    """A question and what is expected: the calculator's expression for the skills that call it, the
    whole answer for those that do not, and the name that an answer must contain for `name`."""

    skill: Skill
    question: str
    expected: str

    def to_prompt(self) -> Conversation:
        """The question alone, to be answered."""
        return Conversation((Message("user", self.question),))


def judge(question: HeldOutQuestion, *, text: str, calls: Sequence[str]) -> bool:
    """Whether an answer is right.

    text: what the assistant says, calculator calls and their outputs left out. calls: the
    expressions it handed to the calculator, in order. White space at either end does not count.
    """
    if question.skill == "name":
        return question.expected in text
    if question.skill in _CALLS:
        return [call.strip() for call in calls] == [question.expected.strip()]
    return text.strip() == question.expected.strip() and not calls


def held_out_questions(
    context: TaskContext, *, limit: int | None = None
) -> dict[Skill, tuple[HeldOutQuestion, ...]]:
    """The fixed questions of every skill: 20 for the name, 200 or 100 for the others.

    Words come from `context`, so another corpus asks for other words, and one with few words has
    fewer questions. limit: at most so many of each skill, for a quick look.
    """
    makers: dict[Skill, Callable[[TaskContext], list[HeldOutQuestion]]] = {
        "name": _names,
        "sums": _sums,
        "letter_counts": _letter_counts,
        "spelling": _spelling,
        "word_problems": _word_problems,
        "hand_counts": _hand_counts,
        "direct_sums": _direct_sums,
    }
    return {skill: tuple(make(context)[:limit]) for skill, make in makers.items()}


def write_held_out(path: str | os.PathLike[str], questions: Mapping[Skill, Iterable[HeldOutQuestion]]) -> int:
    """Write the questions of every skill as JSONL and return the number of lines."""
    rows = 0
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for asked in questions.values():
            for question in asked:
                file.write(json.dumps(asdict(question)) + "\n")
                rows += 1
    return rows


def read_held_out(path: str | os.PathLike[str]) -> dict[Skill, tuple[HeldOutQuestion, ...]]:
    """The questions of a file by skill. Raises ValueError naming file and line."""
    found: dict[Skill, list[HeldOutQuestion]] = {}
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        try:
            question = HeldOutQuestion(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a held-out question: {error}") from error
        if question.skill not in SKILLS:
            raise ValueError(
                f"{path}:{number}: unknown skill {question.skill!r} (known: {', '.join(SKILLS)})"
            )
        found.setdefault(question.skill, []).append(question)
    return {skill: tuple(asked) for skill, asked in found.items()}


def _names(context: TaskContext) -> list[HeldOutQuestion]:
    return [HeldOutQuestion("name", question, "NanoChat") for question in NAME_PARAPHRASES]


def _sums(context: TaskContext) -> list[HeldOutQuestion]:
    """200 additions: every held-out pair of single digits, then mixed ones, then two digits each."""
    numbers = random.Random("held out/sums")
    one_digit, mixed, two_digits, *_ = number_pools("test")
    pairs = one_digit + numbers.sample(mixed, min(60, len(mixed)))
    pairs += numbers.sample(two_digits, 200 - len(pairs))
    numbers.shuffle(pairs)
    return [HeldOutQuestion("sums", ask_sum(a, "+", b, numbers), f"{a}+{b}") for a, b in pairs]


def _letter_counts(context: TaskContext) -> list[HeldOutQuestion]:
    numbers = random.Random("held out/letter counts")
    found = []
    for word in _words(context, numbers, 200):
        letter = pick_letter(word, numbers)
        question = numbers.choice(QUOTED_TEMPLATES).format(word=word, letter=letter)
        found.append(HeldOutQuestion("letter_counts", question, count_call(word, letter)))
    return found


def _spelling(context: TaskContext) -> list[HeldOutQuestion]:
    numbers = random.Random("held out/spelling")
    return [
        HeldOutQuestion("spelling", numbers.choice(SMALL_TEMPLATES).format(word=word), spelled(word))
        for word in _words(context, numbers, 200)
    ]


def _hand_counts(context: TaskContext) -> list[HeldOutQuestion]:
    numbers = random.Random("held out/hand counts")
    found = []
    for word in _words(context, numbers, 100):
        letter = pick_letter(word, numbers)
        answer = f"{hand_count(word, letter)}. The answer is {word.count(letter)}."
        question = numbers.choice(HAND_TEMPLATES).format(word=word, letter=letter)
        found.append(HeldOutQuestion("hand_counts", question, answer))
    return found


def _word_problems(context: TaskContext) -> list[HeldOutQuestion]:
    numbers = random.Random("held out/word problems")
    found = []
    for pair in numbers.sample(pairs_of("test", range(2, 100), range(2, 100)), 100):
        template, operator = numbers.choice(PROBLEM_TEMPLATES)
        story, expression, _ = write_problem(template, operator, pair, numbers)
        found.append(HeldOutQuestion("word_problems", story, expression))
    return found


def _direct_sums(context: TaskContext) -> list[HeldOutQuestion]:
    numbers = random.Random("held out/direct sums")
    # Five hundred pairs in all: the ones held out for validation are needed too.
    pairs = pairs_of("test", range(50), range(10)) + pairs_of("validation", range(50), range(10))
    return [
        HeldOutQuestion("direct_sums", numbers.choice(DIRECT_TEMPLATES).format(sum=f"{a}+{b}"), str(a + b))
        for a, b in numbers.sample(pairs, min(100, len(pairs)))
    ]


def _words(context: TaskContext, numbers: random.Random, count: int) -> list[str]:
    words = words_of(context, "test", SMALL_WORDS)
    return numbers.sample(words, min(count, len(words)))
