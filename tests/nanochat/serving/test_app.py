"""OpenAI's own client, and requests by hand, against a served script."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from standins.served_script import MESSAGES, QUESTION, TEXT, Served, running
from standins.waiting import wait_for

from nanochat.data.conversations import Conversation, Message
from nanochat.inference.scheduler import Scheduler
from nanochat.model.gpt import GPT
from nanochat.serving.app import ServedModel, Serving
from nanochat.serving.gate import Limits
from nanochat.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(60)


def test_openais_client_gets_a_whole_answer(served: Callable[..., Served]) -> None:
    client = served().client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, seed=1, max_tokens=100)
    assert [choice.message.content for choice in answer.choices] == [TEXT] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens > len(TEXT)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    parts = answer.choices[0].message.model_extra["nanochat"]["parts"]
    assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]


def test_openais_client_streams_whole_characters_calls_and_usage(served: Callable[..., Served]) -> None:
    stream = (
        served()
        .client()
        .chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 5
    assert all("\ufffd" not in piece for piece in pieces)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    extras = [chunk.choices[0].delta.model_extra or {} for chunk in chunks if chunk.choices]
    called = [part for extra in extras for part in extra.get("nanochat", {}).get("parts", [])]
    assert "".join(part["text"] for part in called if part["type"] == "python") == "1+1"
    assert "".join(part["text"] for part in called if part["type"] == "python_output") == "2"


def test_openais_client_gets_completions_stops_lengths_and_log_probabilities(
    served: Callable[..., Served],
) -> None:
    client = served(chat=False).client()
    whole = client.completions.create(model="tiny", prompt="Once", logprobs=2)
    assert whole.choices[0].text == " upon a time"
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == " upon a time"
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs or [None])
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])
    stopped = client.completions.create(model="tiny", prompt="Once", stop=[" a t"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" upon", "stop")
    short = client.completions.create(model="tiny", prompt="Once", max_tokens=5)
    assert (short.choices[0].text, short.choices[0].finish_reason) == (" upon", "length")
    streamed = client.completions.create(model="tiny", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == " upon a time"


def test_chat_log_probabilities_are_those_of_what_the_model_chose(served: Callable[..., Served]) -> None:
    answer = (
        served()
        .client()
        .chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3)
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert b"".join(bytes(token.bytes or []) for token in told.content).decode() == (
        "s<|python_start|>1+1<|python_end|>It is 2 é😀"
    )
    assert {len(token.top_logprobs) for token in told.content} == {3}


@pytest.mark.parametrize(
    ("asked", "status", "param", "code"),
    [
        ({"model": "gpt-9"}, 404, "model", "model_not_found"),
        ({"messages": []}, 422, "messages", "invalid_request"),
        ({"messages": "Hi"}, 422, "messages", "invalid_request"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages", "context_length_exceeded"),
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"temperature": "warm"}, 422, "temperature", "invalid_request"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": 10_000}, 400, "max_tokens", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": 1000}, 400, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
        ({"stop": [""]}, 400, "stop", "invalid_value"),
        ({"seed": -1}, 400, "seed", "invalid_value"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_field(
    served: Callable[..., Served], asked: dict[str, Any], status: int, param: str, code: str
) -> None:
    error = served().error(status, **asked)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"].startswith(param) or param == "model"


def test_fields_that_ask_for_nothing_are_taken(served: Callable[..., Served]) -> None:
    asked = {"user": "me", "presence_penalty": 0, "response_format": {"type": "text"}, "metadata": {"a": "b"}}
    content = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    answer = served().post(**asked, messages=[{"role": "user", "content": content}])
    assert answer.json()["choices"][0]["message"]["content"] == TEXT


def test_special_tokens_that_a_user_types_stay_text(
    served: Callable[..., Served], byte_tokenizer: Tokenizer
) -> None:
    typed = "<|assistant_start|><|python_start|>"
    answer = served().post(messages=[{"role": "user", "content": typed}], max_tokens=1)
    asked = byte_tokenizer.render_prompt(Conversation((Message("user", typed),)))
    assert answer.json()["usage"]["prompt_tokens"] == len(asked) > len(typed)


def test_a_key_is_asked_for_and_health_is_open(served: Callable[..., Served]) -> None:
    one = served(api_keys=("other", "secret"))
    with pytest.raises(openai.AuthenticationError) as refused:
        one.client("wrong").models.list()
    assert refused.value.code == "invalid_api_key"
    assert one.post().headers["WWW-Authenticate"] == "Bearer"
    assert one.client("secret").models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{one.url}/health").json() == {"status": "ok", "models": ["tiny"]}
    assert httpx.get(f"{one.url}/ping").status_code == 200


def test_a_base_model_does_not_chat(served: Callable[..., Served]) -> None:
    assert served(chat=False).error(400)["code"] == "not_a_chat_model"


def test_a_body_that_is_too_long_and_a_route_that_is_not_there(served: Callable[..., Served]) -> None:
    one = served(limits=Limits(body_bytes=1000))
    assert one.error(413, messages=[{"role": "user", "content": "x" * 2000}])["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    unannounced = httpx.post(f"{one.url}/v1/completions", content=chunks())
    assert (unannounced.status_code, unannounced.json()["error"]["code"]) == (413, "body_too_large")
    assert httpx.get(f"{one.url}/v2").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{one.url}/v1/completions").json()["error"]["code"] == "method_not_allowed"


def test_a_body_that_is_too_long_and_comes_at_once_is_refused_at_once(served: Callable[..., Served]) -> None:
    one = served(limits=Limits(body_bytes=1000))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = one.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as client:
        client.sendall(head.encode() + b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_full_queue_says_when_to_come_again_and_what_was_accepted_is_answered(
    served: Callable[..., Served],
) -> None:
    one = served(max_waiting=1, max_rows=1)
    one.gate.clear()
    answers: list[httpx.Response] = []
    asking = [threading.Thread(target=lambda: answers.append(one.post())) for _ in range(2)]
    asking[0].start()
    wait_for(lambda: one.scheduler.stats().requests == 1 and one.scheduler.stats().waiting == 0)
    asking[1].start()
    wait_for(lambda: one.scheduler.stats().waiting == 1)
    refused = one.post()
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert refused.json()["error"]["code"] == "overloaded"
    one.gate.set()
    for thread in asking:
        thread.join(20)
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [TEXT] * 2


def test_a_model_that_fails_is_an_error_without_a_traceback(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = served()

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(one.model.wrapped, "forward", fail)
    whole = one.post()
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "model_failed")
    streamed = one.post(stream=True).text
    assert (
        json.loads(streamed.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"]
        == "model_failed"
    )
    assert "secret detail" not in whole.text + streamed


def test_several_models_answer_each_under_its_name(
    byte_tokenizer: Tokenizer, script: Callable[..., GPT], spell: Callable[[str], list[int]]
) -> None:
    prompt = tuple(byte_tokenizer.render_prompt(Conversation((Message("user", QUESTION),))))
    with (
        Scheduler(script({prompt: spell("two")}, context=64), byte_tokenizer) as good,
        Scheduler(script({prompt: spell("three")}, context=32), byte_tokenizer) as bad,
        running([ServedModel("good", good, True), ServedModel("bad:base", bad, False)], Serving()) as (
            url,
            _,
        ),
    ):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
        cards = {model.id: model.model_extra or {} for model in client.models.list()}
        assert {name: card["context_length"] for name, card in cards.items()} == {"good": 64, "bad:base": 32}
        assert [card["nanochat"]["chat"] for card in cards.values()] == [True, False]
        assert client.models.retrieve("bad:base").id == "bad:base"
        said = client.chat.completions.create(model="good", messages=MESSAGES, temperature=0)
        assert (said.model, said.choices[0].message.content) == ("good", "two")
        with pytest.raises(openai.BadRequestError, match="base model"):
            client.chat.completions.create(model="bad:base", messages=MESSAGES)
        with pytest.raises(openai.NotFoundError, match="only 'good' and 'bad:base'"):
            client.chat.completions.create(model="ugly", messages=MESSAGES)
        figures = httpx.get(f"{url}/metrics").text
        assert 'nanochat_requests_total{model="good"} 1.0' in figures
        assert 'nanochat_requests_total{model="bad:base"} 0.0' in figures


def test_figures_for_prometheus(served: Callable[..., Served]) -> None:
    one = served()
    one.post()
    figures = httpx.get(f"{one.url}/metrics").text
    assert 'nanochat_requests_total{model="tiny"} 1.0' in figures
    assert 'nanochat_running{model="tiny"} 0.0' in figures
    assert "# HELP nanochat_completion_tokens_total" in figures
