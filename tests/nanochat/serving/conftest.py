from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from standins.served_script import Served

    from nanochat.model.gpt import GPT
    from nanochat.tokenizer import Tokenizer


@pytest.fixture
def served(
    byte_tokenizer: Tokenizer, script: Callable[..., GPT], spell: Callable[[str], list[int]]
) -> Iterator[Callable[..., Served]]:
    """served(chat=…, api_keys=…, max_waiting=…): a server that ends with the test."""
    from standins.served_script import LONG, QUESTION, SAID, Gated, Served, running

    from nanochat.data.conversations import Conversation, Message
    from nanochat.inference.scheduler import Scheduler
    from nanochat.serving.app import ServedModel, Serving
    from nanochat.serving.protocol import Defaults

    prompt = byte_tokenizer.render_prompt(Conversation((Message("user", QUESTION),)))
    answers = {
        tuple(prompt): spell(SAID),
        (byte_tokenizer.bos, *byte_tokenizer.encode("Once")): spell(" upon a time"),
        (byte_tokenizer.bos, *byte_tokenizer.encode("Long")): spell("x" * LONG),
        (byte_tokenizer.bos,): spell("nothing"),
    }
    with contextlib.ExitStack() as stack:

        def start(
            *,
            chat: bool = True,
            max_waiting: int = 8,
            max_rows: int = 4,
            max_tokens: int = 200,
            context: int = 256,
            shutdown_s: float = 20.0,
            said: dict[str, str] | None = None,
            **how: Any,
        ) -> Served:
            gate = threading.Event()
            gate.set()
            stack.callback(gate.set)
            for question, answer in (said or {}).items():
                asked = byte_tokenizer.render_prompt(Conversation((Message("user", question),)))
                answers[tuple(asked)] = spell(answer)
            model = Gated(script(answers, context=context), gate)
            scheduler = stack.enter_context(
                Scheduler(model, byte_tokenizer, max_rows=max_rows, max_waiting=max_waiting)
            )
            defaults = Defaults(max_tokens=max_tokens, temperature=0.0, top_k=None)
            models = [ServedModel("tiny", scheduler, chat)]
            serving = Serving(defaults=defaults, **how)
            url, server = stack.enter_context(running(models, serving, shutdown_s=shutdown_s))
            return Served(url, server, scheduler, model)

        yield start
