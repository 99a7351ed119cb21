"""The OpenAPI page's answers: what each route gives back, errors included.

For people and programs that read the page; the server itself makes its answers without them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReasonName = Literal["stop", "length"]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorDocument(BaseModel):
    error: ErrorBody


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class UsageDocument(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PartDocument(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class PartsDocument(BaseModel):
    """What the calculator was asked and said, in its place."""

    parts: list[PartDocument]


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    nanochat: PartsDocument = PartsDocument(parts=[])


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenToken]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageDocument


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageDocument


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    models: list[str]


_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}

_ERRORS: dict[int, dict[str, Any]] = {
    400: {"description": "A field asks for what cannot be had, or the body is no JSON."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "There is no such model."},
    408: {"description": "The body did not come in time."},
    413: {"description": "The body is too long."},
    422: {"description": "The body is not of the shape that is asked for."},
    429: {"description": "This client has sent too many requests.", "headers": _RETRY_AFTER},
    500: {"description": "The model failed."},
    503: {"description": "The server is busy, or ends.", "headers": _RETRY_AFTER},
}

Responses = dict[int | str, dict[str, Any]]


def asked(document: type[BaseModel]) -> Responses:
    """The answers of a route that asks the model."""
    answer = {
        "description": "The answer; where a stream was asked for, pieces of it as events, and [DONE].",
        "model": document,
        "content": {"text/event-stream": {}},
    }
    return {200: answer, **_errors(*_ERRORS)}


def told(document: type[BaseModel], *errors: int) -> Responses:
    """The answers of a route that tells something."""
    return {200: {"model": document}, **_errors(*errors)}


def _errors(*statuses: int) -> Responses:
    return {status: {**_ERRORS[status], "model": ErrorDocument} for status in statuses}
