"""What users may type and models may say does no harm, and is written nowhere."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from standins.hostile import COSTLY, HOSTILE
from standins.served_script import MESSAGES, TEXT, Served
from standins.waiting import wait_for

from nanochat.recipes import SPECIAL_TOKENS
from nanochat.serving.gate import Limits
from nanochat.store import ObjectStore
from nanochat.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(240)

PROGRAM = [sys.executable, "-c", "from nanochat.cli import main; main()"]

# A comment is no way in, and half of a surrogate pair is nothing that tokens can say.
HARMLESS = [one for one in HOSTILE if one.startswith("1 #") or "\ud83d" in one]

# Neither of these may be found anywhere but in the answer.
PROMPT, KEY = "canary-of-the-prompt", "canary-of-the-key"
SAID = "canary-of-the-answer"


def addresses(port: int) -> set[str]:
    """Where a port of this machine is listened at."""
    found = psutil.net_connections("tcp")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


@pytest.mark.parametrize(("options", "host"), [((), "127.0.0.1"), (("--host", "0.0.0.0"), "0.0.0.0")])
def test_it_listens_on_this_machine_alone_unless_it_is_told_otherwise(
    chat_store: ObjectStore, options: tuple[str, ...], host: str
) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--port", "0", *options],
        env={**os.environ, "NANOCHAT_STORE": chat_store.url, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().partition("/v1 ")[0].rpartition(":")[2])
        assert addresses(port) == {host}
    finally:
        process.terminate()
        warning = process.communicate(timeout=30)[1]
    assert ("reachable from other machines and no API key is asked for" in warning) is bool(options)


@contextlib.contextmanager
def everything_logged() -> Iterator[io.StringIO]:
    """What all loggers say, down to the least important."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in list(root.manager.loggerDict))]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(1)
        logger.propagate = True
    try:
        yield written
    finally:
        root.removeHandler(handler)
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate


def test_prompts_answers_and_keys_are_written_nowhere(
    served: Callable[..., Served], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    one = served(api_keys=(KEY,), said={PROMPT: SAID}, limits=Limits(body_bytes=20_000))
    authorized = {"Authorization": f"Bearer {KEY}"}
    question = {"role": "user", "content": PROMPT}
    refused = [
        {"messages": []},
        {"messages": [{"role": PROMPT, "content": PROMPT}]},
        {"messages": [{"role": "user", "content": {PROMPT: PROMPT}}]},
        {"messages": [{"role": "assistant", "content": PROMPT}]},
        {"messages": [{"role": "user", "content": PROMPT * 100}]},
        {"messages": [{"role": "user", "content": PROMPT * 2000}]},
        {"messages": [question], "stop": [PROMPT] * 9},
        {"messages": [question], "temperature": PROMPT},
        {"messages": [question], "tools": [{PROMPT: PROMPT}]},
        {"messages": [question], "n": 1000},
    ]
    with everything_logged() as logged:

        def ask(headers: dict[str, str], **body: Any) -> httpx.Response:
            asked = {"model": "tiny", "messages": [question], **body}
            return httpx.post(f"{one.url}/v1/chat/completions", json=asked, headers=headers, timeout=20)

        # httpx, which asks here, may log what it likes.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).propagate = False
        assert ask(authorized).json()["choices"][0]["message"]["content"] == SAID
        assert ask(authorized, stream=True).text.endswith("data: [DONE]\n\n")
        assert ask({"Authorization": f"Bearer {KEY[:-1]}"}).status_code == 401
        errors = [ask(authorized, **body) for body in refused]
        broken = f'{{"model": "tiny", "messages": "{PROMPT}'
        errors.append(
            httpx.post(f"{one.url}/v1/chat/completions", content=broken, headers=authorized, timeout=20)
        )

        def fail(*args: Any, **options: Any) -> None:
            raise RuntimeError(f"cannot read {PROMPT}")

        monkeypatch.setattr(one.model.wrapped, "forward", fail)
        errors += [ask(authorized), ask(authorized, stream=True)]
        monkeypatch.setattr("nanochat.serving.app.chat_request", fail)
        errors.append(ask(authorized))
        assert errors[-1].json()["error"]["code"] == "server_failed"
        figures = httpx.get(f"{one.url}/metrics").text
        health = httpx.get(f"{one.url}/health").text
        wait_for(lambda: one.doors.open == 0)
    assert all(error.status_code >= 400 for error in errors[:-2])
    told = [error.text + str(error.headers) for error in errors]
    out, err = capfd.readouterr()
    for place in (*told, figures, health, logged.getvalue(), out, err):
        for secret in (PROMPT, KEY, SAID):
            assert secret not in place
    # And yet whoever runs it learns where it failed.
    assert "the model failed: RuntimeError" in logged.getvalue()
    assert "a request failed: RuntimeError" in logged.getvalue()
    assert "in fail" in logged.getvalue()


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_special_tokens_that_are_typed_stay_text_whoever_says_them(
    served: Callable[..., Served], byte_tokenizer: Tokenizer, role: str
) -> None:
    one = served(context=1000)
    typed = "".join(SPECIAL_TOKENS)
    plain = "x" * len(byte_tokenizer.encode(typed))
    assert all(token < 256 + 6 for token in byte_tokenizer.encode(typed))

    def prompt_tokens(content: str) -> int:
        messages = [{"role": role, "content": content}]
        if role == "assistant":
            messages.insert(0, MESSAGES[0])
        if role != "user":
            messages.append(MESSAGES[0])
        answer = one.post(messages=messages, max_tokens=1)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert prompt_tokens(typed) == prompt_tokens(plain)


def test_special_tokens_in_a_text_to_complete_stay_text_too(
    served: Callable[..., Served], byte_tokenizer: Tokenizer
) -> None:
    typed = "".join(SPECIAL_TOKENS)
    answer = served(context=1000).post("/v1/completions", model="tiny", prompt=typed, max_tokens=1)
    assert answer.json()["usage"]["prompt_tokens"] == 1 + len(byte_tokenizer.encode(typed))


def test_half_of_a_surrogate_pair_is_no_reason_to_fail(served: Callable[..., Served]) -> None:
    one = served()
    for field in (
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        {"messages": MESSAGES, "stop": "\ud83d"},
        {"messages": MESSAGES, "model": "\ud83d"},
        {"messages": MESSAGES, "user": "\ud83d"},
        {"messages": [{"role": "\ud83d", "content": "x"}]},
    ):
        asked = json.dumps({"model": "tiny", "max_tokens": 2, **field})
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{one.url}/v1/chat/completions", content=asked, headers=headers, timeout=20)
        assert answer.status_code < 500, (field, answer.text)


def test_bodies_that_are_meant_to_break_a_parser_do_not(served: Callable[..., Served]) -> None:
    one = served()
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "seed": ' + b"9" * 100_000 + b"}",
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "seed": 1e300}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b"\xff\xfe{\x00}\x00",
    ]
    for body in bodies:
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{one.url}/v1/completions", content=body, headers=headers, timeout=20)
        assert answer.status_code in (400, 422), (body[:60], answer.text)
        assert answer.json()["error"]["message"]
    host, port = one.url.removeprefix("http://").split(":")
    for head in (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(head)
            assert client.recv(100).startswith(b"HTTP/1.1 4")
    assert one.post().json()["choices"][0]["message"]["content"] == TEXT


def test_hostile_calls_end_within_their_bounds_and_hold_nobody_up(served: Callable[..., Served]) -> None:
    hostile = [*COSTLY, *(one for one in HOSTILE if 0 < len(one) < 120 and one not in HARMLESS)]
    assert len(hostile) >= 40
    call = "<|python_start|>{}<|python_end|><|output_start|>error<|output_end|>on"
    said = {f"case {number}": call.format(expression) for number, expression in enumerate(hostile)}
    one = served(said=said, context=1000, max_rows=16, max_waiting=100, max_tokens=600)
    resident = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(16) as pool:
        begin_s = time.monotonic()
        asked = [
            pool.submit(one.post, messages=[{"role": "user", "content": f"case {number}"}])
            for number in range(len(hostile))
        ]
        waits = []
        while not all(answer.done() for answer in asked):
            asked_s = time.monotonic()
            with httpx.Client(timeout=30) as client:
                plain = client.post(
                    f"{one.url}/v1/completions", json={"model": "tiny", "prompt": "Once", "max_tokens": 3}
                )
            assert plain.status_code == 200
            waits.append(time.monotonic() - asked_s)
        answers = [answer.result().json() for answer in asked]
    # Two workers, and each call has a second, or two where the worker has to be ended from outside.
    assert time.monotonic() - begin_s < 2.5 * len(hostile)
    # A call holds up its own answer only.
    assert max(waits) < 15
    for expression, answer in zip(hostile, answers, strict=True):
        message = answer["choices"][0]["message"]
        # Where a costly one has a result, the script goes on in the middle of what it says of an error.
        assert message["content"].endswith("on"), expression
        outputs = [part["text"] for part in message["nanochat"]["parts"] if part["type"] == "python_output"]
        assert len("".join(outputs)) <= 64, expression
        if expression in HOSTILE:
            assert outputs == ["error"], expression
    assert psutil.Process().memory_info().rss - resident < 200e6
