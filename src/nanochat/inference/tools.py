"""Tool use, token by token: what the model's tokens mean, and which ones are forced upon it.

`<|python_start|>` code `<|python_end|>` goes to the calculator, and `<|output_start|>` result
`<|output_end|>` is due next, whatever the model would say. A call that is refused gets "error" as
its result, so the model neither ends for it nor makes an output up.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.data.conversations import Part, PartType
from nanochat.inference.calculator import Calculator, Refusal, Result
from nanochat.recipes import SPECIAL_TOKENS

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

ERROR_OUTPUT = "error"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the model asked the calculator, and what came back."""

    expression: str
    outcome: Result | Refusal


class ToolMachine:
    """Reads the tokens of one answer. `calls` is what it has asked the calculator so far.

    executor: where calls are worked on, so that a slow one holds up its own answer only (None: in
    `read`, which then returns when the call is answered).
    """

    def __init__(
        self, tokenizer: Tokenizer, calculator: Calculator, executor: Executor | None = None
    ) -> None:
        self.calls: list[ToolCall] = []
        self._tokenizer = tokenizer
        self._calculator = calculator
        self._executor = executor
        self._names = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
        self._due: deque[int] = deque()
        self._asked: tuple[str, Future[Result | Refusal]] | None = None
        self._state: PartType = "text"
        self._code: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def waiting(self) -> Future[Result | Refusal] | None:
        """The call without whose result the answer cannot go on."""
        if self._due or self._asked is None or self._asked[1].done():
            return None
        return self._asked[1]

    def take_due(self) -> int | None:
        """The token that is forced next, if any. Not to be asked for while the machine is `waiting`."""
        if not self._due and self._asked is not None:
            self._answer(*self._asked)
            self._asked = None
        return self._due.popleft() if self._due else None

    def read(self, token: int) -> list[Part]:
        """The text that `token` completes (none for special tokens and for parts of a character)."""
        name = self._names.get(token)
        if name is None:
            if self._state == "python":
                self._code.append(token)
            return self._pieces(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        if name == "<|python_start|>":
            return self._enter("python")
        if name == "<|python_end|>" and self._state == "python":
            self._ask()
            return self._enter("text")
        if name == "<|output_start|>":
            return self._enter("python_output")
        if name == "<|output_end|>" and self._state == "python_output":
            return self._enter("text")
        return []  # any other special token says nothing in an answer

    def finish(self) -> list[Part]:
        """What is left when the answer ends: U+FFFD for a character that was begun."""
        if self._asked is not None and self._asked[1].done():
            self._answer(*self._asked)
        self._asked = None
        return self._rest()

    def _rest(self) -> list[Part]:
        return self._pieces(self._decoder.decode(b"", final=True))

    def _enter(self, state: PartType) -> list[Part]:
        # A character that one part leaves unfinished must not swallow the start of the next.
        rest = self._rest()
        self._state = state
        self._code = []
        return rest

    def _ask(self) -> None:
        expression = self._tokenizer.decode(self._code)
        outcome: Future[Result | Refusal]
        if self._executor is None:
            outcome = Future()
            outcome.set_result(self._calculator.evaluate(expression))
        else:
            outcome = self._executor.submit(self._calculator.evaluate, expression)
        self._asked = expression, outcome
        self._due.append(self._tokenizer.special("<|output_start|>"))

    def _answer(self, expression: str, future: Future[Result | Refusal]) -> None:
        error = future.exception()
        outcome = future.result() if error is None else Refusal(str(error))
        self.calls.append(ToolCall(expression, outcome))
        output = outcome.text if isinstance(outcome, Result) else ERROR_OUTPUT
        self._due.extend(self._tokenizer.encode(output))
        self._due.append(self._tokenizer.special("<|output_end|>"))

    def _pieces(self, text: str) -> list[Part]:
        return [Part(self._state, text)] if text else []


def join_pieces(pieces: Iterable[Part]) -> tuple[Part, ...]:
    """Consecutive pieces of one type as one part."""
    joined: list[Part] = []
    for piece in pieces:
        if joined and joined[-1].type == piece.type:
            joined[-1] = Part(piece.type, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return tuple(joined)


# What stands between pieces of two types when people read them: "[12+30 = 42] The answer is 42."
_BETWEEN: dict[tuple[PartType, PartType], str] = {
    ("text", "python"): "[",
    ("text", "python_output"): "[= ",
    ("python", "python_output"): " = ",
    ("python", "text"): "] ",
    ("python_output", "python"): "] [",
    ("python_output", "text"): "] ",
}


def written(pieces: Iterable[Part]) -> Iterator[str]:
    """Pieces as people read them, calls and outputs in brackets; joined they are the whole."""
    state: PartType = "text"
    for piece in pieces:
        if piece.type != state:
            yield _BETWEEN[state, piece.type]
            state = piece.type
        yield piece.text
    if state != "text":
        yield "]"
