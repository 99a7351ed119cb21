"""The HTTP interface: OpenAI's routes over a scheduler, health for machines, figures for Prometheus.

Nothing of a prompt, an answer or a key is logged.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.inference import generation
from nanochat.inference.scheduler import (
    ClosedError,
    Delta,
    End,
    Event,
    Finish,
    Handle,
    QueueFullError,
    Scheduler,
)
from nanochat.serving.answers import Answers
from nanochat.serving.errors import ApiError, bad_value, overloaded
from nanochat.serving.protocol import ChatBody, CompletionBody, Defaults, chat_request, completion_request

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}

# How often a client that waits for a whole answer is looked for.
_LOOK_FOR_CLIENT_S = 0.5


@dataclass(frozen=True)
class ServedModel:
    """A model under the name that clients ask for. chat: it was trained to answer, not only to continue a
    text."""

    name: str
    scheduler: Scheduler
    chat: bool


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How models are served. api_key: what clients must send; None lets everybody in. request_s: an answer
    that takes longer is ended as if it had reached its length."""

    defaults: Defaults = field(default_factory=Defaults)
    api_key: str | None = None
    max_body_bytes: int = 1 << 20
    request_s: float = 300.0


def create_app(models: Sequence[ServedModel], serving: Serving) -> FastAPI:
    """The application. The schedulers are the caller's to close, when the server has ended."""
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None)
    service = _Service(models, serving)
    guarded = [Depends(service.require_key)]
    app.add_api_route("/v1/models", service.models, dependencies=guarded)
    app.add_api_route("/v1/models/{model}", service.model, dependencies=guarded)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], dependencies=guarded)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"], dependencies=guarded)
    app.add_api_route("/health", service.health)
    app.add_api_route("/ping", service.health)
    app.add_api_route("/metrics", service.metrics, response_class=PlainTextResponse)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_BodyLimit, most_bytes=serving.max_body_bytes)
    return app


class _Service:
    def __init__(self, models: Sequence[ServedModel], serving: Serving) -> None:
        self._models = {model.name: model for model in models}
        self._serving = serving
        self._started = int(time.time())
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(models))

    # -- routes ------------------------------------------------------------------------------------

    async def require_key(self, request: Request) -> None:
        key = self._serving.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as `Authorization: Bearer …`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(model) for model in self._models.values()]}

    async def model(self, model: str) -> dict[str, Any]:
        return self._card(self._find(model))

    async def chat(self, body: ChatBody, request: Request) -> Any:
        model = self._find(body.model)
        if not model.chat:
            raise ApiError(
                400,
                f"{model.name} is a base model: it continues text (/v1/completions) and was not "
                "trained to chat",
                code="not_a_chat_model",
                param="model",
            )
        tokenizer = model.scheduler.tokenizer
        asked = chat_request(body, tokenizer, model.scheduler.context, self._serving.defaults)
        answers = Answers("chat", model.name, tokenizer, logprobs=bool(body.logprobs))
        return await self._answer(model.scheduler, asked, answers, body, request)

    async def complete(self, body: CompletionBody, request: Request) -> Any:
        model = self._find(body.model)
        tokenizer = model.scheduler.tokenizer
        asked = completion_request(body, tokenizer, model.scheduler.context, self._serving.defaults)
        answers = Answers("completion", model.name, tokenizer, logprobs=body.logprobs is not None)
        return await self._answer(model.scheduler, asked, answers, body, request)

    async def health(self) -> dict[str, Any]:
        if not all(model.scheduler.alive for model in self._models.values()):
            raise overloaded("the model has stopped answering")
        return {"status": "ok", "models": list(self._models)}

    async def metrics(self) -> PlainTextResponse:
        return PlainTextResponse(
            generate_latest(self._registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    # -- answering ---------------------------------------------------------------------------------

    def _card(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "nanochat",
            "context_length": model.scheduler.context,
            # No fields of OpenAI's: what the chat page asks in which way.
            "nanochat": {"chat": model.chat, "defaults": self._serving.defaults.model_dump()},
        }

    def _find(self, name: str) -> ServedModel:
        model = self._models.get(name)
        if model is None:
            raise ApiError(
                404,
                f"there is no model {name!r} here, only {' and '.join(map(repr, self._models))}",
                code="model_not_found",
                param="model",
            )
        return model

    async def _answer(
        self,
        scheduler: Scheduler,
        asked: generation.Request,
        answers: Answers,
        body: ChatBody | CompletionBody,
        request: Request,
    ) -> Any:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            handle = scheduler.submit(asked, deliver)
        except QueueFullError as error:
            raise overloaded(f"{error}; try again") from error
        except ClosedError as error:
            raise overloaded("the server is shutting down") from error
        except ValueError as error:
            raise bad_value(error) from error
        # It takes no more than its time, however slowly it is read.
        ending = loop.call_later(self._serving.request_s, handle.cancel)
        if body.stream:
            stream = self._stream(events, answers, handle, ending, usage=body.include_usage, n=asked.n)
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        try:
            return JSONResponse(await self._whole(events, answers, request))
        finally:
            ending.cancel()
            handle.cancel()

    async def _whole(self, events: asyncio.Queue[Event], answers: Answers, request: Request) -> Any:
        finished: dict[int, generation.Generation] = {}
        while True:
            try:
                event = await asyncio.wait_for(events.get(), _LOOK_FOR_CLIENT_S)
            except TimeoutError:
                if await request.is_disconnected():
                    raise ApiError(499, "the client has gone", code="client_gone") from None
                continue
            if isinstance(event, Finish):
                finished[event.choice] = event.generation
            elif isinstance(event, End):
                _raise_failure(event)
                return answers.whole([finished[choice] for choice in sorted(finished)], event.usage)

    async def _stream(
        self,
        events: asyncio.Queue[Event],
        answers: Answers,
        handle: Handle,
        ending: asyncio.TimerHandle,
        *,
        usage: bool,
        n: int,
    ) -> AsyncIterator[str]:
        try:
            for chunk in answers.opening(n):
                yield _sse(chunk)
            while True:
                event = await events.get()
                if isinstance(event, Delta):
                    yield _sse(answers.piece(event.choice, event.parts, event.tokens))
                elif isinstance(event, Finish):
                    yield _sse(answers.last(event.choice, event.reason))
                else:
                    break
            if event.error is not None:
                yield _sse(_failure().document())
                return
            if usage:
                yield _sse(answers.usage(event.usage))
            yield "data: [DONE]\n\n"
        finally:
            # Also where the client went away in the middle.
            ending.cancel()
            handle.cancel()


def _sse(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _failure() -> ApiError:
    return ApiError(500, "the model failed on this request", code="model_failed")


def _raise_failure(end: End) -> None:
    if end.error is not None:
        raise _failure() from end.error


class _Figures:
    """The schedulers' figures as Prometheus reads them, by model."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        stats = {model.name: model.scheduler.stats() for model in self._models}
        gauges = {
            "running": "Answers that are being written.",
            "waiting": "Requests whose turn has not come.",
        }
        counters = {
            "requests": "Requests that were accepted.",
            "prompt_tokens": "Prompt tokens of requests that have ended.",
            "completion_tokens": "Tokens written for them.",
            "cached_tokens": "Prompt tokens that were known already.",
        }
        for family, meanings in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, meaning in meanings.items():
                metric = family(f"nanochat_{name}", meaning, labels=["model"])
                for model, figures in stats.items():
                    metric.add_metric([model], getattr(figures, name))
                yield metric


class _BodyLimit:
    """Refuses a body that is longer than may be, before it is held in memory."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._most_bytes:
            refused = ApiError(413, self._reason, code=_CODES[413])
            answer = JSONResponse(refused.document(), 413, headers={"Connection": "close"})
            await answer(scope, receive, send)
            return
        read_bytes = 0

        async def limited() -> Message:
            nonlocal read_bytes
            message = await receive()
            read_bytes += len(message.get("body", b""))
            if read_bytes > self._most_bytes:
                raise HTTPException(413, self._reason)
            return message

        await self._app(scope, limited, send)

    @property
    def _reason(self) -> str:
        return f"the body is longer than {self._most_bytes} bytes"


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.document(), error.status, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not of the shape: which field, and what is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    where = f"{param}: " if param else ""
    refused = ApiError(422, f"{where}{first['msg']}", code="invalid_request", param=param)
    return JSONResponse(refused.document(), 422)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    refused = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(refused.document(), error.status_code, headers=error.headers)
