"""`nanochat serve` as a program."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nanochat.serving.server import is_loopback
from nanochat.store import ObjectStore

NANOCHAT = str(Path(sys.executable).parent / "nanochat")
QUESTION = {
    "model": "quick",
    "messages": [{"role": "user", "content": "What is your name?"}],
    "temperature": 0,
}

pytestmark = pytest.mark.timeout(120)


@contextlib.contextmanager
def serving(
    store: ObjectStore, *options: str, command: str = "serve", says: str = "quick answers", **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [NANOCHAT, command, "--port", "0", *options],
        env={**os.environ, "NANOCHAT_STORE": store.url, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(rf"{says} at (http://\S+)/v1 \(Ctrl-C ends\)\n", line)
        assert found, line + process.communicate(timeout=20)[1]
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_a_trained_model_is_asked_over_http_and_ends_when_what_it_has_accepted_is_done(
    chat_store: ObjectStore,
) -> None:
    with serving(chat_store) as (process, url):
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=30).json()
        assert answer["choices"][0]["message"]["content"] == "I am NanoChat 😀."
        pieces = []
        asked = {**QUESTION, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=30) as stream:
            for line in stream.iter_lines():
                if not pieces:
                    process.send_signal(signal.SIGTERM)
                if line:
                    pieces.append(line.removeprefix("data: "))
        assert pieces[-1] == "[DONE]"
        deltas = [json.loads(piece)["choices"][0]["delta"] for piece in pieces[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == "I am NanoChat 😀."
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_ctrl_c_ends_it(chat_store: ObjectStore) -> None:
    with serving(chat_store) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_a_base_model_completes(chat_store: ObjectStore) -> None:
    with serving(chat_store, "--source", "base", NANOCHAT_API_KEY="key") as (_, url):
        asked = {"model": "quick", "prompt": "Once upon", "temperature": 0}
        assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 401
        answer = httpx.post(
            f"{url}/v1/completions", json=asked, headers={"Authorization": "Bearer key"}, timeout=30
        )
        assert answer.json()["choices"][0]["text"] == " a time there was a model."


def test_two_models_are_compared_at_one_address(chat_store: ObjectStore) -> None:
    names = ["quick", "quick:base"]
    with serving(chat_store, *names, command="compare", says="quick and quick:base answer") as (process, url):
        assert process.stdout is not None
        assert process.stdout.readline() == f"chat page: {url}/?compare\n"
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == names
        asked = {"prompt": "Once upon", "temperature": 0, "max_tokens": 40}
        base = httpx.post(f"{url}/v1/completions", json={**asked, "model": "quick:base"}, timeout=30)
        assert base.json()["choices"][0]["text"] == " a time there was a model."
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=30)
        assert answer.json()["choices"][0]["message"]["content"] == "I am NanoChat 😀."


def test_what_cannot_be_served_is_said(chat_store: ObjectStore) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NANOCHAT_STORE": chat_store.url}
        return subprocess.run([NANOCHAT, *words], env=environment, capture_output=True, text=True, timeout=60)

    missing = run("serve", "--source", "mid")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "no finished midtrain stage" in missing.stderr
    unknown = run("compare", "quick", "quick:first")
    assert unknown.stderr == "error: quick:first: a stage is base, mid, sft, not 'first'\n"
    assert (unknown.returncode, unknown.stdout) == (1, "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = run("serve", "--port", str(taken.getsockname()[1]))
    assert busy.returncode == 1
    assert re.match(r"error: .*in use", busy.stderr)


def test_what_other_machines_reach() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.2", "example.org"]))
