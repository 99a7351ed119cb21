"""Twenty ways to ask for the model's name that no training data contains.

They are fixed. The identity file and its variations are held to them by a test: no training
question may equal one of these, nor contain one, whatever its case, punctuation and contractions.
"""

from __future__ import annotations

import re

NAME_PARAPHRASES = (
    "Could you tell me your name?",
    "What should I call you?",
    "Do you have a name?",
    "What name do you go by?",
    "How are you called?",
    "Please state your name.",
    "May I know your name?",
    "What do they call you?",
    "Which name were you given?",
    "I did not catch your name. What is it?",
    "Who am I chatting with?",
    "Would you mind telling me what you are called?",
    "Tell me who you are and what your name is.",
    "So your name is what?",
    "Under what name are you known?",
    "Can I ask what your name is?",
    "Let me know your name, please.",
    "What is the name of this chatbot?",
    "What are you named?",
    "Who is answering me, what is your name there?",
)

_CONTRACTIONS = (
    (r"\b(what|who|that|it|how|where)'s\b", r"\1 is"),
    (r"\bi'm\b", "i am"),
    (r"\b(you|they|we)'re\b", r"\1 are"),
    (r"\b(do|does|did|is|are)n't\b", r"\1 not"),
)


def normalise(question: str) -> str:
    """Lower case, contractions written out, punctuation gone, one space between words."""
    text = question.casefold().replace("’", "'")
    if "'" in text:
        for short, full in _CONTRACTIONS:
            text = re.sub(short, full, text)
    return " ".join(re.findall(r"[a-z0-9]+", text.replace("'", "")))


_NORMALISED = tuple(f" {normalise(question)} " for question in NAME_PARAPHRASES)


def holds_held_out_question(question: str) -> bool:
    """Whether a held-out paraphrase, normalised, is `question` or a part of it."""
    text = f" {normalise(question)} "
    return any(held_out in text for held_out in _NORMALISED)
