"""What OpenAI's clients send, as far as it means something here.

Fields that would change the answer and that this server cannot honour are refused by name, unless they
are at their default; fields that only describe the caller are ignored. `top_k` and `repetition_penalty`,
which OpenAI does not have, are taken as other servers of open models take them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanochat.data.conversations import Conversation, ConversationError, Message
from nanochat.inference.generation import Request
from nanochat.inference.sampling import MAX_LOGPROBS, Sampling
from nanochat.serving.errors import ApiError, bad_field, bad_value
from nanochat.tokenizer import Tokenizer

# As OpenAI's API has it.
MAX_STOPS = 4

# What changes an answer in a way that this server cannot, and the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")


class StreamOptions(_Body):
    include_usage: bool = False


class TextContent(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextContent]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(piece.text for piece in self.content)


class GenerationBody(_Body):
    """The fields that chat and completions share. Absent ones are the server's defaults."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(GenerationBody):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionBody(GenerationBody):
    prompt: str | list[str]
    logprobs: int | None = None


class Defaults(BaseModel):
    """What a request gets that does not say otherwise. max_tokens: also the most that it may ask for."""

    model_config = ConfigDict(frozen=True)

    max_tokens: int = Field(default=1024, ge=1)
    temperature: float = Field(default=0.6, ge=0)
    top_k: int | None = Field(default=50, ge=1)


def refuse_unsupported(body: GenerationBody) -> None:
    """Raises ApiError naming the first field that asks for what is not here."""
    asked = body.model_extra or {}
    for name, nothing in _UNSUPPORTED.items():
        if name in asked and asked[name] not in nothing:
            raise bad_field(name, "is not supported by this server", code="unsupported_parameter")


def chat_request(body: ChatBody, tokenizer: Tokenizer, context: int, defaults: Defaults) -> Request:
    """Raises ApiError."""
    refuse_unsupported(body)
    roles = {"developer": "system"}
    messages = tuple(
        Message(roles.get(message.role, message.role), message.text())  # type: ignore[arg-type]
        for message in body.messages
    )
    try:
        prompt = tokenizer.render_prompt(Conversation(messages))
    except ConversationError as error:
        raise bad_field("messages", str(error)) from error
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    top = body.top_logprobs or 0
    if top and not body.logprobs:
        raise bad_field("top_logprobs", "needs logprobs to be true")
    if not 0 <= top <= MAX_LOGPROBS:
        raise bad_field("top_logprobs", f"must be 0 to {MAX_LOGPROBS} (got {top})")
    return _request(body, prompt, context, defaults, wanted, top if body.logprobs else None, "messages")


def completion_request(
    body: CompletionBody, tokenizer: Tokenizer, context: int, defaults: Defaults
) -> Request:
    """Raises ApiError."""
    refuse_unsupported(body)
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(texts) != 1:
        raise bad_field("prompt", f"must be one text, this is a list of {len(texts)}: send one request each")
    prompt = [tokenizer.bos, *tokenizer.encode(texts[0])]
    return _request(body, prompt, context, defaults, body.max_tokens, body.logprobs, "prompt")


def _request(
    body: GenerationBody,
    prompt: list[int],
    context: int,
    defaults: Defaults,
    max_tokens: int | None,
    logprobs: int | None,
    source: str,
) -> Request:
    if len(prompt) >= context:
        raise ApiError(
            400,
            f"{source}: {len(prompt)} tokens, and this model reads {context}, answer included; shorten it",
            code="context_length_exceeded",
            param=source,
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > MAX_STOPS:
        raise bad_field("stop", f"must be at most {MAX_STOPS} strings (got {len(stop)})")
    if max_tokens is not None and max_tokens > defaults.max_tokens:
        raise bad_field("max_tokens", f"must be at most {defaults.max_tokens} here (got {max_tokens})")
    given = {
        "max_tokens": max_tokens,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "repetition_penalty": body.repetition_penalty,
        "seed": body.seed,
    }
    wishes = {**defaults.model_dump(), **{name: value for name, value in given.items() if value is not None}}
    try:
        sampling = Sampling(**wishes, stop=tuple(stop), logprobs=logprobs)
    except ValueError as error:
        raise bad_value(error) from error
    return Request(prompt=prompt, sampling=sampling, n=1 if body.n is None else body.n)
