"""Samples: what a model says to the same few prompts, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.data.conversations import Conversation, Message
from nanochat.inference.engine import Engine
from nanochat.inference.sampling import Sampling
from nanochat.inference.tools import written

CHAT_QUESTIONS = (
    "What is your name?",
    "What can you do?",
    "How were you trained?",
    "What is 37+25?",
    'How many times does the letter "r" occur in "strawberry"?',
    "Spell the word: dragon",
)

SAMPLE_TOKENS = 64


def continue_texts(
    engine: Engine, texts: Sequence[str], max_tokens: int = SAMPLE_TOKENS
) -> list[dict[str, str]]:
    """Greedy continuations as ``{"prompt": …, "text": …}``; the text is the new part alone."""
    bos = engine.tokenizer.bos
    return _sample(engine, texts, [[bos, *engine.tokenizer.encode(text)] for text in texts], max_tokens)


def answer_questions(
    engine: Engine, questions: Sequence[str] = CHAT_QUESTIONS, max_tokens: int = SAMPLE_TOKENS
) -> list[dict[str, str]]:
    """Greedy answers to single questions as ``{"prompt": …, "text": …}``, calculator calls written out."""
    prompts = [
        engine.tokenizer.render_prompt(Conversation((Message("user", question),))) for question in questions
    ]
    return _sample(engine, questions, prompts, max_tokens)


def _sample(
    engine: Engine, shown: Sequence[str], prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[dict[str, str]]:
    # A prompt of the recipe's may be too long for a model this small; the others are still worth reading.
    kept = [index for index, prompt in enumerate(prompts) if len(prompt) < engine.context]
    generations = engine.generate([prompts[index] for index in kept], Sampling(max_tokens=max_tokens))
    return [
        {"prompt": shown[index], "text": "".join(written(generation.parts))}
        for index, generation in zip(kept, generations, strict=True)
    ]
