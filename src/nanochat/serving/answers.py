"""What a model said, in the shapes that OpenAI's clients read."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from nanochat.data.conversations import Part, PartType
from nanochat.inference.generation import FinishReason, Generation, Token
from nanochat.inference.scheduler import Usage
from nanochat.inference.tools import join_pieces
from nanochat.tokenizer import Tokenizer

Kind = Literal["chat", "completion"]

# A generation that was broken off for taking too long is as long as it may be.
_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "cancelled": "length"}


class Answers:
    """Documents of one request's answers: all of one id, time and model."""

    def __init__(self, kind: Kind, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._kind = kind
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        # By choice: the type of its newest part, and the index of its newest call or output.
        self._newest_part: dict[int, tuple[PartType, int]] = {}
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, generations: list[Generation], usage: Usage) -> dict[str, Any]:
        """Not streamed: all of it."""
        choices = [
            {
                "index": index,
                **self._said(generation.text, generation.parts),
                "logprobs": self._logprobs_of(generation.tokens),
                "finish_reason": _REASONS[generation.finish_reason],
            }
            for index, generation in enumerate(generations)
        ]
        name = "chat.completion" if self._kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": _usage(usage)}

    def opening(self, choices: int) -> Iterator[dict[str, Any]]:
        """The chunks that open the answers of a chat."""
        if self._kind == "chat":
            for choice in range(choices):
                yield self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def piece(self, choice: int, parts: Iterable[Part], tokens: tuple[Token, ...]) -> dict[str, Any]:
        """The chunk of what came anew."""
        parts = join_pieces(parts)
        text = "".join(part.text for part in parts if part.type == "text")
        if self._kind == "completion":
            return self._chunk(choice, {"text": text}, None, self._logprobs_of(tokens))
        delta: dict[str, Any] = {"content": text} if text else {}
        called = self._called(choice, parts)
        if called:
            delta["nanochat"] = {"parts": called}
        return self._chunk(choice, {"delta": delta}, None, self._logprobs_of(tokens))

    def last(self, choice: int, reason: FinishReason) -> dict[str, Any]:
        """The chunk that closes an answer."""
        said: dict[str, Any] = {"delta": {}} if self._kind == "chat" else {"text": ""}
        return self._chunk(choice, said, _REASONS[reason], None)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk behind all answers, for those who ask for it."""
        return {**self._head, "object": self._chunk_name, "choices": [], "usage": _usage(usage)}

    def _called(self, choice: int, parts: Iterable[Part]) -> list[dict[str, str | int]]:
        """Pieces of calls and outputs. Those of one of them have one index, by which OpenAI's client, too,
        puts them together."""
        called: list[dict[str, str | int]] = []
        kind, index = self._newest_part.get(choice, ("text", -1))
        for part in parts:
            if part.type != "text":
                index += part.type != kind
                called.append({"index": index, **_part(part)})
            kind = part.type
        self._newest_part[choice] = kind, index
        return called

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat" else "text_completion"

    def _chunk(
        self, choice: int, said: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        answer = {"index": choice, **said, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self._chunk_name, "choices": [answer]}

    def _said(self, text: str, parts: tuple[Part, ...]) -> dict[str, Any]:
        if self._kind == "completion":
            return {"text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if any(part.type != "text" for part in parts):
            # What the calculator was asked and said, in its place: no field of OpenAI's.
            message["nanochat"] = {"parts": [_part(part) for part in parts]}
        return {"message": message}

    def _logprobs_of(self, tokens: tuple[Token, ...]) -> dict[str, Any] | None:
        """Of what the model chose: the calculator's output has none."""
        if not self._logprobs:
            return None
        chosen = [token for token in tokens if not token.forced and token.logprob is not None]
        if self._kind == "completion":
            return {
                "tokens": [self._text(token.id) for token in chosen],
                "token_logprobs": [token.logprob for token in chosen],
                "top_logprobs": [{self._text(id): value for id, value in token.top} for token in chosen],
            }
        return {
            "content": [
                {
                    **self._token(token.id, token.logprob),
                    "top_logprobs": [self._token(id, value) for id, value in token.top],
                }
                for token in chosen
            ],
            "refusal": None,
        }

    def _token(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._text(id),
            "logprob": logprob,
            "bytes": list(self._tokenizer.decode_bytes([id])),
        }

    def _text(self, id: int) -> str:
        """A token may be a part of a character; its bytes tell which."""
        return self._tokenizer.decode([id])


def _part(part: Part) -> dict[str, str]:
    return {"type": part.type, "text": part.text}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
