"""Who the model is: the hand-written conversations, and the quick model's variations on them.

`identity` is the file as it stands. `identity_small` is what a model of a million parameters needs
to recognise a question however it is typed: greetings in front, lower case, no question mark, and
questions about the name far more often than their share of the file. A variation never equals one
of the held-out questions of `nanochat.data.heldout`, nor holds one inside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace

from nanochat.data.conversations import Conversation, read_conversations, require_valid
from nanochat.data.tasks.context import TaskContext
from nanochat.data.tasks.name_paraphrases import holds_held_out_question
from nanochat.data.tasks.splits import Split
from nanochat.data.tasks.task import Task, choose_rows, generated
from nanochat.store.digests import digest_file

_GREETINGS = (
    "Hello!",
    "Hi!",
    "Hey,",
    "Hi,",
    "Hello,",
    "Hey!",
    "Good morning!",
    "Good evening,",
    "Hello there!",
)
_LEADS = ("So,", "OK,", "Please,", "Well,", "Tell me,", "Excuse me,", "One question:", "Now,")
_TAILS = ("please", "thanks", "then")
_NAME_SHARE = 0.4
_NAME_QUESTION = re.compile(
    r"\b(names?|named|called|call you\w*|address you|who are you|who is this|who am i \w+ing)\b",
    re.IGNORECASE,
)


def is_about_the_name(conversation: Conversation) -> bool:
    """One question, about the model's name, that the answer gives in its own words."""
    if len(conversation.messages) != 2:
        return False
    question, answer = conversation.messages
    return bool(_NAME_QUESTION.search(question.text)) and "NanoChat" in answer.text


def vary(question: str, numbers: random.Random) -> str:
    """The same question as someone else would type it; the original where a variation is held out."""
    varied = question
    chance = numbers.random()
    if chance < 0.20:
        varied = f"{numbers.choice(_GREETINGS)} {_joined(varied, numbers)}"
    elif chance < 0.30:
        varied = f"{numbers.choice(_LEADS)} {_joined(varied, numbers)}"
    elif chance < 0.36 and varied.endswith("?"):
        varied = f"{varied[:-1]}, {numbers.choice(_TAILS)}?"
    varied = _contracted(varied, numbers)
    if numbers.random() < 0.30:
        varied = varied.lower()
    chance = numbers.random()
    if chance < 0.25:
        varied = varied.rstrip("?.!") or varied
    elif chance < 0.30:
        varied += numbers.choice(("?", "!", " :)"))
    return question if holds_held_out_question(varied) else varied


def _joined(question: str, numbers: random.Random) -> str:
    """The question after a comma: usually no longer with a capital, unless it begins with I."""
    if re.match(r"I\b|[A-Z]{2}", question) or numbers.random() < 0.3:
        return question
    return question[:1].lower() + question[1:]


_CONTRACTIONS = (("What is", "What's"), ("what is", "what's"), ("Who is", "Who's"), ("who is", "who's"),
                 ("I am", "I'm"), ("do not", "don't"))  # fmt: skip


def _contracted(question: str, numbers: random.Random) -> str:
    for full, short in _CONTRACTIONS:
        if full in question and numbers.random() < 0.3:
            return question.replace(full, short, 1)
    return question


def _read(context: TaskContext) -> list[Conversation]:
    return list(read_conversations(context.require_identity()))


def _generate(context: TaskContext, split: Split, rows: int | None, seed: int) -> Iterator[Conversation]:
    """Nothing for validation and test: every conversation is for training, as in nanochat."""
    if split == "train":
        conversations = _read(context)
        for index in choose_rows("identity", split, seed, len(conversations), rows):
            yield conversations[index]


def _generate_small(
    context: TaskContext, split: Split, rows: int, numbers: random.Random
) -> Iterator[Conversation]:
    if split != "train":
        return
    conversations = _read(context)
    named = [conversation for conversation in conversations if is_about_the_name(conversation)]
    others = [conversation for conversation in conversations if not is_about_the_name(conversation)]
    for _ in range(rows):
        pool = named if others == [] or (named and numbers.random() < _NAME_SHARE) else others
        conversation = numbers.choice(pool)
        yield Conversation(
            tuple(
                replace(message, content=vary(message.text, numbers)) if message.role == "user" else message
                for message in conversation.messages
            )
        )


def _check(context: TaskContext) -> None:
    require_valid(context.require_identity())


def _inputs(context: TaskContext) -> dict[str, str]:
    return {"file": digest_file(context.require_identity())}


IDENTITY = Task(name="identity", version=1, generate=_generate, inputs=_inputs, check=_check, finite=True)
IDENTITY_SMALL = generated(
    name="identity_small", version=1, make=_generate_small, inputs=_inputs, check=_check
)
