"""A server over a model that says what a script says, when it is let."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
from standins.waiting import wait_for

from nanochat.inference.scheduler import Scheduler
from nanochat.model.gpt import GPT
from nanochat.serving.app import ServedModel, Serving, create_app
from nanochat.serving.gate import Gate
from nanochat.serving.server import Server

QUESTION = "What is 1+1?"
SAID = "s<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>It is 2 é😀"
TEXT = "sIt is 2 é😀"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]

# What the script has to "Long": so many characters.
LONG = 2000


class Gated(GPT):
    """Every step waits until the gate is open, and then takes `pace_s`."""

    def __init__(self, model: GPT, gate: threading.Event) -> None:
        super().__init__(model.config, model.vocab_size)
        self.wrapped, self.gate, self.pace_s = model, gate, 0.0

    def forward(self, *args: Any, **options: Any) -> Any:
        assert self.gate.wait(20)
        time.sleep(self.pace_s)
        return self.wrapped(*args, **options)


class Served:
    """A server at `url` over a scheduler whose model answers while `gate` is open."""

    def __init__(self, url: str, server: Server, scheduler: Scheduler, model: Gated) -> None:
        self.url = url
        self.server = server
        self.scheduler = scheduler
        self.model = model
        self.gate = model.gate

    @property
    def doors(self) -> Gate:
        gate: Gate = self.server.config.app.state.gate  # type: ignore[union-attr]
        return gate

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=self.body(path, **body), timeout=120)

    def body(self, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
        if path == "/v1/chat/completions":
            return {"model": "tiny", "messages": MESSAGES, **body}
        return body

    def error(self, status: int, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
        answer = self.post(path, **body)
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        return error

    @contextlib.contextmanager
    def connection(self, path: str = "/v1/chat/completions", **body: Any) -> Iterator[socket.socket]:
        """A client that has sent its request, and holds 4 KiB of what it does not read."""
        sent = json.dumps(self.body(path, **body)).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(sent)}", "", ""])
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = self.url.removeprefix("http://").split(":")
            client.connect((host, int(port)))
            client.sendall(head.encode() + sent)
            yield client

    def end(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextlib.contextmanager
def running(
    models: Sequence[ServedModel], serving: Serving, *, shutdown_s: float = 20.0
) -> Iterator[tuple[str, Server]]:
    """A server's address, and the server, which has ended when the block has."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(create_app(models, serving), "served", shutdown_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
