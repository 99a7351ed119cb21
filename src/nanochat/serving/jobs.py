"""Jobs of a queue: what may be in their input, and what comes of them.

A job's input is one of

    {"question": "…"}  {"messages": [{"role": "user", "content": "…"}, …]}  {"prompt": "…"}
    {"openai_route": "/v1/chat/completions", "openai_input": {…}}

The first three take `max_tokens`, `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`, `stop` and
`stream`, as OpenAI's API does here. `prompt` is continued; that is what a base model does. The answer is one
document,

    {"text": "…", "finish_reason": "stop", "usage": {…}, "model": …, "stage": …, "fingerprint": …,
     "receipt_sha256": …}

and with `stream` documents {"text": "…"} before one like it, whose text is empty. The last form is what the
platform makes of a request to its OpenAI address: it is answered with exactly what our API answers, streams
in pieces of its server-sent events.

What is refused is `{"error": "…"}` with our API's error and its status as JSON in a text, because the
platform keeps a job's error as text: {"status": 400, "message": …, "type": …, "param": …, "code": …}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.types import ASGIApp

from nanochat.serving.errors import ApiError, bad_field
from nanochat.serving.inprocess import Answer, ask

_log = logging.getLogger(__name__)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ASKS = ("question", "messages", "prompt")
_WISHES = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "stream")
_EVENT_STREAM = "text/event-stream"


class Jobs:
    """Answers jobs from an application of `nanochat.serving.app`.

    model: what is served; weights: what is told of it in our own answers. post_every_s: between two
    pieces of a stream at least so long passes, because each is a request of its own to the platform.
    on_failure: called when the model has failed on a request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        model: str,
        weights: dict[str, Any],
        post_every_s: float,
        on_failure: Callable[[], None],
    ) -> None:
        self._app = app
        self._model = model
        self._weights = weights
        self._post_every_s = post_every_s
        self._on_failure = on_failure

    async def answer(self, given: Any) -> AsyncGenerator[Any, None]:
        """What a handler yields for a job's input. An error is always the last."""
        try:
            if isinstance(given, dict) and ("openai_route" in given or "openai_input" in given):
                said = self._openai(given)
            else:
                said = self._own(self._body(given))
            async with contextlib.aclosing(said):
                async for piece in said:
                    yield piece
        except ApiError as error:
            if error.status >= 500:
                self._on_failure()
            yield _error(error)
        except Exception:
            # The SDK would tell the caller where in our code it was.
            _log.exception("a job failed")
            self._on_failure()
            yield _error(ApiError(500, "the worker failed on this job", code="worker_failed"))

    # ----------------------------------------------------------------------------------------------

    async def _openai(self, given: dict[str, Any]) -> AsyncGenerator[Any, None]:
        route, asked = given.get("openai_route", CHAT), given.get("openai_input")
        if not isinstance(route, str) or not route.startswith("/"):
            raise bad_field("openai_route", "must be a path such as /v1/chat/completions")
        async with self._asked(route, asked) as answer:
            if not answer.content_type.startswith(_EVENT_STREAM):
                body = (await answer.body()).decode()
                yield json.loads(body) if answer.content_type == "application/json" else body
                return
            async with contextlib.aclosing(self._grouped(answer.pieces)) as groups:
                async for group in groups:
                    yield b"".join(group).decode()
                    if any(_error_of(piece) for piece in group):
                        self._on_failure()

    def _body(self, given: Any) -> dict[str, Any]:
        """As OpenAI's API takes it; chat, if it has messages."""
        if not isinstance(given, dict):
            raise bad_field("input", "must be an object")
        asks = [name for name in _ASKS if name in given]
        if len(asks) != 1:
            raise ApiError(
                400,
                f"input: must have exactly one of {', '.join(_ASKS)} (it has {' and '.join(asks) or 'none'})",
                code="invalid_value",
                param="input",
            )
        unknown = next((name for name in given if name not in (*_ASKS, *_WISHES)), None)
        if unknown is not None:
            raise bad_field(unknown, f"is no field of a job's input; those are {', '.join(_ASKS + _WISHES)}")
        body = {name: value for name, value in given.items() if name != "question"}
        if asks == ["question"]:
            if not isinstance(given["question"], str) or not given["question"].strip():
                raise bad_field("question", "must be a text that is not empty")
            body["messages"] = [{"role": "user", "content": given["question"]}]
        return {**body, "model": self._model}

    async def _own(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        chat = "messages" in body
        whole = not body.get("stream")
        asked = body if whole else {**body, "stream_options": {"include_usage": True}}
        async with self._asked(CHAT if chat else COMPLETIONS, asked) as answer:
            if whole:
                document = json.loads(await answer.body())
                (choice,) = document["choices"]
                text = choice["message"]["content"] if chat else choice["text"]
                yield self._last(text, choice["finish_reason"], document["usage"])
                return
            reason, usage = None, None
            async with contextlib.aclosing(self._grouped(answer.pieces)) as groups:
                async for group in groups:
                    text = ""
                    for piece in group:
                        if error := _error_of(piece):
                            raise ApiError(500, error["message"], code=error["code"])
                        for choice in _event(piece).get("choices", []):
                            text += choice["delta"].get("content", "") if chat else choice["text"]
                            reason = choice["finish_reason"] or reason
                        usage = _event(piece).get("usage") or usage
                    if text:
                        yield {"text": text}
            yield self._last("", reason, usage)

    def _last(self, text: str, reason: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "finish_reason": reason, "usage": usage, **self._weights}

    @contextlib.asynccontextmanager
    async def _asked(self, route: str, body: Any) -> AsyncIterator[Answer]:
        """Without a body it is asked for, with one it is posted. Raises ApiError for what is refused."""
        method, data = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
        async with ask(self._app, method, route, data) as answer:
            if answer.status >= 400:
                error = json.loads(await answer.body())["error"]
                raise _Told(answer.status, error)
            yield answer

    async def _grouped(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[list[bytes], None]:
        """The first at once, then what has come in the meantime."""
        arrived: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def collect() -> None:
            try:
                async for piece in pieces:
                    arrived.put_nowait(piece)
            finally:
                arrived.put_nowait(None)

        collecting = asyncio.ensure_future(collect())
        told = float("-inf")
        try:
            while (piece := await arrived.get()) is not None:
                await asyncio.sleep(max(0.0, told + self._post_every_s - time.monotonic()))
                group = [piece]
                while not arrived.empty() and (piece := arrived.get_nowait()) is not None:
                    group.append(piece)
                told = time.monotonic()
                yield group
                if piece is None:
                    break
            await collecting
        finally:
            collecting.cancel()


class _Told(ApiError):
    """An error of the API's, as it told it."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(status, error["message"], code=error["code"], param=error["param"])
        self._error = error

    def document(self) -> dict[str, dict[str, str | None]]:
        return {"error": self._error}


def _error(error: ApiError) -> dict[str, str]:
    return {"error": json.dumps({"status": error.status, **error.document()["error"]})}


def _event(piece: bytes) -> dict[str, Any]:
    """The document of a server-sent event; empty for the one that ends a stream."""
    data = piece.decode().removeprefix("data: ").strip()
    return {} if data == "[DONE]" else dict(json.loads(data))


def _error_of(piece: bytes) -> dict[str, Any] | None:
    found = _event(piece).get("error")
    return dict(found) if found else None
