"""Sums: through the calculator, in the head, and inside a story.

Pairs of numbers are held out in both orders and for every operation, so a held-out sum is new
however it is written.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from nanochat.data.conversations import Conversation, Part, exchange
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.splits import Split, split_of_pair
from nanochat.data.tasks.task import generated, no_inputs

SUM_TEMPLATES = (
    "What is {sum}?",
    "What is {sum}?",
    "How much is {sum}?",
    "What does {sum} make?",
    "Calculate {sum}.",
    "Compute {sum}.",
    "{sum}",
    "{sum}=",
    "{sum} = ?",
    "Can you calculate {sum}?",
    "Please work out {sum}.",
    "What's {sum}?",
    "what is {sum}",
    "Tell me what {sum} is.",
)
_SPOKEN = {"+": "plus", "-": "minus", "*": "times"}
# Sums dominate: they are what is asked of a small model, and a difference is copied the same way.
_OPERATORS = ("+",) * 7 + ("-",) * 2 + ("*",)

DIRECT_TEMPLATES = (
    "Without Python, what is {sum}?",
    "Without Python, how much is {sum}?",
    "In your head, what is {sum}?",
)

_PEOPLE = ("Ana", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stones")
# (story, operator); {a} and {b} are the numbers in the order of the call.
PROBLEM_TEMPLATES = (
    ("{person} has {a} {thing} and gets {b} more. How many {thing} does {person} have now?", "+"),
    ("{person} has {a} {thing} and finds {b} more. How many {thing} is that?", "+"),
    ("There are {a} {thing} in a box and {b} {thing} in a bag. How many {thing} are there?", "+"),
    ("{person} buys {a} {thing} today and {b} {thing} tomorrow. How many {thing} in all?", "+"),
    ("{person} has {a} {thing} and gives away {b}. How many {thing} are left?", "-"),
    ("There are {a} {thing} on a table. {person} takes {b}. How many {thing} remain?", "-"),
    ("{person} has {a} boxes with {b} {thing} each. How many {thing} is that?", "*"),
)


def pairs_of(split: Split, first: range, second: range) -> list[tuple[int, int]]:
    """All pairs of one split, in order."""
    return [(a, b) for a in first for b in second if split_of_pair(a, b) == split]


def tool_answer(expression: str, result: int) -> tuple[Part, ...]:
    """The calculator call, its output and the sentence that repeats it."""
    return (
        Part("python", expression),
        Part("python_output", str(result)),
        Part("text", f"The answer is {result}."),
    )


def write_sum(a: int, operator: str, b: int, numbers: random.Random) -> str:
    """``12+34``, ``12 + 34`` or ``12 plus 34``."""
    chance = numbers.random()
    if chance < 0.45:
        return f"{a}{operator}{b}"
    if chance < 0.75:
        return f"{a} {operator} {b}"
    return f"{a} {_SPOKEN[operator]} {b}"


def ask_sum(a: int, operator: str, b: int, numbers: random.Random) -> str:
    """A question for a sum."""
    written = write_sum(a, operator, b, numbers)
    if operator == "+" and numbers.random() < 0.1:
        return numbers.choice(("Add {a} and {b}.", "What is the sum of {a} and {b}?")).format(a=a, b=b)
    return numbers.choice(SUM_TEMPLATES).format(sum=written)


def calculate(a: int, operator: str, b: int) -> int:
    """What the calculator gives."""
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def _pick(pools: tuple[list[tuple[int, int]], ...], numbers: random.Random) -> tuple[int, int]:
    """One pair: from the pools of `number_pools` in equal parts, else few would be short."""
    return numbers.choice(numbers.choice(pools))


def number_pools(split: Split) -> tuple[list[tuple[int, int]], ...]:
    """Pairs with none, with one, and twice those with two numbers of two digits; a split may lack a
    pool of few pairs."""
    small, large = range(10), range(10, 100)
    pools = (
        pairs_of(split, small, small),
        pairs_of(split, small, large) + pairs_of(split, large, small),
        pairs_of(split, large, large),
        pairs_of(split, large, large),
    )
    return tuple(pool for pool in pools if pool)


def _generate(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    pools = number_pools(split)
    for _ in range(rows):
        a, b = _pick(pools, numbers)
        operator = numbers.choice(_OPERATORS)
        if operator == "-" and a < b and numbers.random() < 0.8:
            a, b = b, a
        yield exchange(
            ask_sum(a, operator, b, numbers),
            tool_answer(f"{a}{operator}{b}", calculate(a, operator, b)),
        )


def _generate_direct(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    """Sums of 0–49 and 0–9 answered without the calculator: hard enough to leave room for learning."""
    pairs = pairs_of(split, range(50), range(10))
    for _ in range(rows):
        a, b = numbers.choice(pairs)
        yield exchange(numbers.choice(DIRECT_TEMPLATES).format(sum=f"{a}+{b}"), str(a + b))


def write_problem(
    template: str, operator: str, pair: tuple[int, int], numbers: random.Random
) -> tuple[str, str, int]:
    """(story, expression, result) of a word problem; what is taken away is never more than there is."""
    a, b = (max(pair), min(pair)) if operator == "-" else pair
    story = template.format(a=a, b=b, person=numbers.choice(_PEOPLE), thing=numbers.choice(_THINGS))
    return story, f"{a}{operator}{b}", calculate(a, operator, b)


def _generate_problems(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    pairs = pairs_of(split, range(2, 100), range(2, 100))
    for _ in range(rows):
        template, operator = numbers.choice(PROBLEM_TEMPLATES)
        story, expression, result = write_problem(template, operator, numbers.choice(pairs), numbers)
        yield exchange(story, tool_answer(expression, result))


ARITHMETIC = generated(name="arithmetic", version=1, make=_generate, inputs=no_inputs)
DIRECT_SUMS = generated(name="direct_sums", version=1, make=_generate_direct, inputs=no_inputs)
WORD_PROBLEMS = generated(name="word_problems", version=1, make=_generate_problems, inputs=no_inputs)
