"""The HTTP interface: OpenAI's routes over a scheduler, health for machines, figures for Prometheus.

Nothing of a prompt, an answer or a key is logged.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nanochat.inference import generation
from nanochat.inference.scheduler import (
    ClosedError,
    Delta,
    End,
    Finish,
    Handle,
    QueueFullError,
    Scheduler,
)
from nanochat.serving.answers import Answers
from nanochat.serving.documents import (
    ChatCompletion,
    Health,
    ModelCard,
    ModelList,
    TextCompletion,
    asked,
    told,
)
from nanochat.serving.errors import ApiError, bad_value, overloaded
from nanochat.serving.gate import Gate, Gated, Limits, log_failure, shutting_down
from nanochat.serving.inbox import Inbox
from nanochat.serving.page import add_page
from nanochat.serving.protocol import ChatBody, CompletionBody, Defaults, chat_request, completion_request

_CODES = {404: "not_found", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_large"}


@dataclass(frozen=True)
class ServedModel:
    """A model under the name that clients ask for. chat: it was trained to answer, not only to continue a
    text."""

    name: str
    scheduler: Scheduler
    chat: bool


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How models are served. api_keys: of which clients must send one; without any everybody may ask.
    request_s: an answer that takes longer is ended as if it had reached its length, and one that has not
    begun by then is refused."""

    defaults: Defaults = field(default_factory=Defaults)
    api_keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    request_s: float = 300.0


def create_app(models: Sequence[ServedModel], serving: Serving) -> FastAPI:
    """The application; `app.state.gate` is its gate. The schedulers are the caller's to close, when the
    server has ended."""
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None)
    app.state.gate = gate = Gate(serving.limits, serving.api_keys)
    service = _Service(models, serving, gate)
    # The gate asks for the key; this tells the OpenAPI page so.
    keyed = [Depends(HTTPBearer(auto_error=False))] if serving.api_keys else []
    listed, card = told(ModelList, 401), told(ModelCard, 401, 404)
    app.add_api_route("/v1/models", service.models, responses=listed, dependencies=keyed)
    app.add_api_route("/v1/models/{model}", service.model, responses=card, dependencies=keyed)
    for path, answer, document in (
        ("/v1/chat/completions", service.chat, ChatCompletion),
        ("/v1/completions", service.complete, TextCompletion),
    ):
        app.add_api_route(path, answer, methods=["POST"], responses=asked(document), dependencies=keyed)
    for path in ("/health", "/ping"):
        app.add_api_route(path, service.health, responses=told(Health, 503))
    app.add_api_route("/metrics", service.metrics, response_class=PlainTextResponse)
    add_page(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Gated, gate=gate)
    return app


class _Service:
    def __init__(self, models: Sequence[ServedModel], serving: Serving, gate: Gate) -> None:
        self._models = {model.name: model for model in models}
        self._serving = serving
        self._gate = gate
        self._started = int(time.time())
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(models, gate))

    # -- routes ------------------------------------------------------------------------------------

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
        # In another thread: a megabyte takes the tokenizer long enough for others to notice.
        wanted = await asyncio.to_thread(
            chat_request, body, tokenizer, model.scheduler.context, self._serving.defaults
        )
        answers = Answers("chat", model.name, tokenizer, logprobs=bool(body.logprobs))
        return await self._answer(model.scheduler, wanted, answers, body, request)

    async def complete(self, body: CompletionBody, request: Request) -> Any:
        model = self._find(body.model)
        tokenizer = model.scheduler.tokenizer
        wanted = await asyncio.to_thread(
            completion_request, body, tokenizer, model.scheduler.context, self._serving.defaults
        )
        answers = Answers("completion", model.name, tokenizer, logprobs=body.logprobs is not None)
        return await self._answer(model.scheduler, wanted, answers, body, request)

    async def health(self) -> dict[str, Any]:
        if not all(model.scheduler.alive for model in self._models.values()):
            raise overloaded("the model has stopped answering")
        if self._gate.draining:  # so that nobody is sent here any more
            raise shutting_down()
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
        wanted: generation.Request,
        answers: Answers,
        body: ChatBody | CompletionBody,
        request: Request,
    ) -> Any:
        inbox = Inbox()
        try:
            handle = scheduler.submit(wanted, inbox.deliver)
        except QueueFullError as error:
            self._gate.refused[503] += 1
            raise overloaded(f"{error}; try again") from error
        except ClosedError as error:
            raise shutting_down() from error
        except ValueError as error:
            raise bad_value(error) from error
        work = _Work(inbox, handle, self._serving.request_s, self._gate)
        if body.stream:
            return _EventStream(self._stream(work, answers, usage=body.include_usage, n=wanted.n), work)
        try:
            return JSONResponse(await self._whole(work, answers, request))
        finally:
            work.end()

    async def _whole(self, work: _Work, answers: Answers, request: Request) -> Any:
        answering = asyncio.ensure_future(work.finished())
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ApiError(499, "the client has gone", code="client_gone")
            generations, end = answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
        if end.error is not None:
            log_failure("the model failed", end.error)
            raise _failure() from end.error
        if _in_vain(generations):
            raise self._too_late()
        return answers.whole(generations, end.usage)

    async def _stream(self, work: _Work, answers: Answers, *, usage: bool, n: int) -> AsyncIterator[str]:
        for chunk in answers.opening(n):
            yield _sse(chunk)
        finished: list[generation.Generation] = []
        while True:
            for event in await work.inbox.take():
                if isinstance(event, Delta):
                    yield _sse(answers.piece(event.choice, event.parts, event.tokens))
                elif isinstance(event, Finish):
                    finished.append(event.generation)
                    if not _in_vain([event.generation]):
                        yield _sse(answers.last(event.choice, event.reason))
                elif event.error is not None:
                    log_failure("the model failed", event.error)
                    yield _sse(_failure().document())
                    return
                elif _in_vain(finished):
                    yield _sse(self._too_late().document())
                    return
                else:
                    if usage:
                        yield _sse(answers.usage(event.usage))
                    yield "data: [DONE]\n\n"
                    return

    def _too_late(self) -> ApiError:
        """Why an answer was broken off before it began."""
        if self._gate.draining:
            return shutting_down()
        return overloaded(
            f"its turn did not come within {self._serving.request_s:g} s; try again", code="timed_out"
        )


class _Work:
    """A request that was accepted. Its time runs from now, however slowly the answer is read."""

    def __init__(self, inbox: Inbox, handle: Handle, most_s: float, gate: Gate) -> None:
        self.inbox = inbox
        self._cancel = handle.cancel
        self._breaks = gate.breaks
        self._breaks.add(self._cancel)
        self._ending = asyncio.get_running_loop().call_later(most_s, self._cancel)

    def end(self) -> None:
        """Nobody waits for the rest, if there is one."""
        self._ending.cancel()
        self._breaks.discard(self._cancel)
        self._cancel()

    async def finished(self) -> tuple[list[generation.Generation], End]:
        """All of its answers, in their order, and the last event."""
        finished: dict[int, generation.Generation] = {}
        while True:
            for event in await self.inbox.take():
                if isinstance(event, Finish):
                    finished[event.choice] = event.generation
                elif isinstance(event, End):
                    return [finished[choice] for choice in sorted(finished)], event


class _EventStream(StreamingResponse):
    """Events as they come. The work ends with the stream, also where the client leaves it, however early."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], work: _Work) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.end()


def _in_vain(generations: list[generation.Generation]) -> bool:
    """Whether all were broken off before they had a token."""
    return all(one.finish_reason == "cancelled" and not one.tokens for one in generations)


async def _gone(request: Request) -> None:
    """Returns when the client has gone away. To be awaited when the request's body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sse(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _failure() -> ApiError:
    return ApiError(500, "the model failed on this request", code="model_failed")


class _Figures:
    """The schedulers' figures as Prometheus reads them, by model."""

    def __init__(self, models: Sequence[ServedModel], gate: Gate) -> None:
        self._models = models
        self._gate = gate

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("nanochat_open", "Requests whose answer is not sent yet.", self._gate.open)
        refused = CounterMetricFamily(
            "nanochat_refused", "Requests that were not let in, by status.", labels=["status"]
        )
        for status, count in sorted(self._gate.refused.items()):
            refused.add_metric([str(status)], count)
        yield refused
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
