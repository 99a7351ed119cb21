"""What is asked of a model, and what it said."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from nanochat.data.conversations import Part
from nanochat.inference.calculator import Refusal, Result
from nanochat.inference.sampling import Sampler, Sampling
from nanochat.inference.stops import StopFilter
from nanochat.inference.tools import ToolCall, ToolMachine, join_pieces

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, ids with `<|bos|>` included, and how to answer it, `n` times.

    stream: which random numbers of its seed the first answer draws; the others follow. Requests of
    one seed and one prompt differ by it.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """A new token. forced: it is the calculator's output and not the model's choice.

    logprob: natural logarithm of the model's probability of it, where log-probabilities were asked
    for (None for the first token of a result that the row had to wait for). top: the likeliest tokens
    and theirs, as many as were asked for, likeliest first.
    """

    id: int
    forced: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one row said.

    tokens: the new ones, without the one that ended it. parts: the same as text, calls and outputs, up
    to the stop string where there was one. stop_id: the token that ended it, or None where a stop
    string, `max_tokens`, the context or a cancellation did.
    """

    tokens: tuple[Token, ...]
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    stop_id: int | None

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.id for token in self.tokens)

    @property
    def forced(self) -> tuple[bool, ...]:
        """Which tokens were the calculator's output."""
        return tuple(token.forced for token in self.tokens)

    @property
    def text(self) -> str:
        """What the model says to the user: neither the calculator's calls nor its outputs."""
        return "".join(part.text for part in self.parts if part.type == "text")


class Row:
    """One answer while it grows.

    limit: tokens of prompt and answer at most. unread: the model has not read the newest token yet.
    """

    def __init__(
        self, prompt: Sequence[int], sampling: Sampling, *, stream: int, limit: int, machine: ToolMachine
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.limit = limit
        self.sampler = Sampler(sampling, stream, prompt)
        self.unread = False
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None
        self._machine = machine
        self._stops = StopFilter(sampling.stop) if sampling.stop else None
        self._pieces: list[Part] = []
        self._pieces_taken = 0
        self._tokens_taken = 0
        self._stop_id: int | None = None

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def waiting(self) -> Future[Result | Refusal] | None:
        """The calculator's call without whose result the row cannot go on."""
        return self._machine.waiting

    def take_due(self) -> int | None:
        """The token that is forced next, if any."""
        return self._machine.take_due()

    def accept(self, token: Token, stop_ids: frozenset[int]) -> None:
        """Grow by one token, or end by it."""
        if not token.forced and token.id in stop_ids:
            self.end("stop", token.id)
            return
        self.tokens.append(token)
        self.unread = True
        self.sampler.met(token.id)
        self._say(self._machine.read(token.id))
        if self._stops is not None and self._stops.found is not None:
            self.end("stop")
        elif len(self.prompt) + len(self.tokens) >= self.limit:
            self.end("length")

    def end(self, reason: FinishReason, stop_id: int | None = None) -> None:
        self._say(self._machine.finish())
        self._say_held()
        self.finish_reason, self._stop_id = reason, stop_id

    def take_news(self) -> tuple[tuple[Part, ...], tuple[Token, ...]]:
        """Pieces of text and tokens that came since the last call."""
        pieces, tokens = self._pieces[self._pieces_taken :], self.tokens[self._tokens_taken :]
        self._pieces_taken, self._tokens_taken = len(self._pieces), len(self.tokens)
        return tuple(pieces), tuple(tokens)

    def generation(self) -> Generation:
        assert self.finish_reason is not None, "the row is still growing"
        return Generation(
            tokens=tuple(self.tokens),
            parts=join_pieces(self._pieces),
            tool_calls=tuple(self._machine.calls),
            finish_reason=self.finish_reason,
            stop_id=self._stop_id,
        )

    def _say(self, pieces: list[Part]) -> None:
        """Add pieces; where there are stop strings, text only as far as it is certain."""
        if self._stops is None:
            self._pieces.extend(pieces)
            return
        for piece in pieces:
            if self._stops.found is not None:
                return
            if piece.type == "text":
                text = self._stops.read(piece.text)
                if text:
                    self._pieces.append(Part("text", text))
            else:
                self._say_held()  # a stop string does not reach across a call
                self._pieces.append(piece)

    def _say_held(self) -> None:
        held = self._stops.flush() if self._stops is not None else ""
        if held:
            self._pieces.append(Part("text", held))
