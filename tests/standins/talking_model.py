"""A language model that answers questions by a script, as fast as it is let."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from standins.scripted_model import ScriptedModel

from nanochat.tokenizer import Tokenizer


class TalkingModel(ScriptedModel):
    """Answers the last question of a chat, whatever came before it.

    says: what it says to a question, special tokens written out; to any other it says how many questions it
    has read. It also continues any text that a key of `says` is the beginning of.
    """

    def __init__(
        self, tokenizer: Tokenizer, spell: Callable[[str], list[int]], says: Mapping[str, str], context: int
    ) -> None:
        end = tokenizer.special("<|assistant_end|>")
        super().__init__(tokenizer.vocab_size, context, {(tokenizer.bos,): ()}, end)
        self._tokenizer = tokenizer
        self._spell = spell
        self._says = {question: spell(answer) for question, answer in says.items()}
        self._changed = threading.Condition()
        self._steps: int | None = None

    def let(self, steps: int | None) -> None:
        """Take so many more steps, and wait then; None: as many as there are."""
        with self._changed:
            self._steps = steps
            self._changed.notify_all()

    def forward(self, *args: Any, **options: Any) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: self._steps is None or self._steps > 0, 20)
            if self._steps is not None:
                self._steps -= 1
        return super().forward(*args, **options)

    def next_token(self, read: tuple[int, ...]) -> int:
        start, user = (self._tokenizer.special(name) for name in ("<|assistant_start|>", "<|user_start|>"))
        if start not in read:
            return self._continued(read)
        at = len(read) - read[::-1].index(start)
        asked = read[len(read) - read[::-1].index(user) : at - 2]
        answer = self._says.get(self._tokenizer.decode(asked))
        if answer is None:
            answer = self._spell(f"Questions so far: {read.count(user)}.")
        position = len(read) - at
        return answer[position] if position < len(answer) else self.otherwise

    def _continued(self, read: tuple[int, ...]) -> int:
        for question, answer in self._says.items():
            prompt = (self._tokenizer.bos, *self._tokenizer.encode(question))
            if read[: len(prompt)] == prompt and len(read) - len(prompt) < len(answer):
                return answer[len(read) - len(prompt)]
        return self._tokenizer.bos
