"""The client on real sockets: silence, broken connections, streams without an end, many threads."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from standins.runpod_api import CANARY

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.errors import MaybeCreated, Unavailable
from dagster_nanochat.launch.runpod.models import GpuRequest, PodRequest

POD = PodRequest(name="dg-token", image="i", disk=1, gpu=GpuRequest(id="NVIDIA L4"))
Behaviour = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Answers every request with `behaviour`; `seen` are the requests that arrived whole."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = _say_nothing
        self.seen: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                server.seen.append(f"{self.command} {self.path}")
                server.behaviour(self)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *args: object) -> None:
                return

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v2"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def _client(url: str, **options: float) -> RunPodClient:
    return RunPodClient(
        CANARY,
        base_url=url,
        read_timeout_s=options.get("read_timeout_s", 5.0),
        create_timeout_s=options.get("create_timeout_s", 5.0),
        sleep=lambda seconds: None,
    )


def _say_nothing(request: BaseHTTPRequestHandler) -> None:
    time.sleep(3.0)
    request.close_connection = True


def _drop(request: BaseHTTPRequestHandler) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)
    request.close_connection = True


def _drop_within_the_answer(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 201 Created\r\ncontent-length: 100\r\n\r\n{")
    _drop(request)


def _stream(*parts: str, then: Behaviour) -> Behaviour:
    def behave(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("content-type", "text/event-stream")
        request.end_headers()
        request.close_connection = True
        for part in parts:
            request.wfile.write(part.encode())
        request.wfile.flush()
        then(request)

    return behave


def _event(line: str) -> str:
    return f"id: 2026-06-01T12:02:03Z/1\ndata: {json.dumps({'source': 'container', 'line': line})}\n\n"


@pytest.mark.parametrize("behaviour", [_say_nothing, _drop, _drop_within_the_answer])
def test_a_creation_that_was_sent_and_not_answered_was_sent_once(
    server: Server, behaviour: Behaviour
) -> None:
    server.behaviour = behaviour
    begin = time.monotonic()
    with _client(server.url, create_timeout_s=0.2) as client, pytest.raises(MaybeCreated):
        client.create_pod(POD)
    assert time.monotonic() - begin < 2.0
    assert server.seen == ["POST /v2/pods"]


@pytest.mark.parametrize("behaviour", [_say_nothing, _drop, _drop_within_the_answer])
def test_a_deletion_that_is_not_answered_is_sent_again(server: Server, behaviour: Behaviour) -> None:
    server.behaviour = behaviour
    with _client(server.url, read_timeout_s=0.2) as client, pytest.raises(Unavailable, match=server.url):
        client.delete_pod("p")
    assert server.seen == ["DELETE /v2/pods/p"] * 4


def test_nobody_at_the_address_has_created_nothing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with _client(f"http://127.0.0.1:{taken.getsockname()[1]}/v2") as client:
            for call in (lambda: client.create_pod(POD), lambda: client.list_pods()):
                with pytest.raises(Unavailable, match="RUNPOD_API_URL"):
                    call()


def _go_on_with(text: bytes) -> Behaviour:
    def behave(request: BaseHTTPRequestHandler) -> None:
        end = time.monotonic() + 3.0
        try:
            while time.monotonic() < end:
                request.wfile.write(text)
                request.wfile.flush()
                time.sleep(0.02)
        except OSError:  # the client has heard enough
            return

    return behave


@pytest.mark.parametrize(
    "then", [_say_nothing, _drop, _go_on_with(b": ping\n\n"), _go_on_with(b"a line without an end")]
)
def test_a_log_has_the_lines_so_far_however_the_stream_goes_on(server: Server, then: Behaviour) -> None:
    server.behaviour = _stream(
        _event("step 1"), ": ping\n\n", _event("step 2"), "data: no JSON\n\n", then=then
    )
    with _client(server.url) as client:
        begin = time.monotonic()
        assert client.pod_logs("p", max_seconds=0.8) == ["step 1", "step 2", "no JSON"]
        assert time.monotonic() - begin < 1.5


def test_a_log_that_never_begins_is_empty(server: Server) -> None:
    server.behaviour = _say_nothing
    with _client(server.url) as client:
        begin = time.monotonic()
        assert client.pod_logs("p", max_seconds=0.4) == []
        assert time.monotonic() - begin < 1.0


def test_a_log_ends_where_it_has_as_many_lines_as_asked_for(server: Server) -> None:
    server.behaviour = _stream(_event("a"), _event("b"), _event("c"), then=_say_nothing)
    with _client(server.url) as client:
        begin = time.monotonic()
        assert client.pod_logs("p", tail=2, max_seconds=20) == ["a", "b"]
        assert time.monotonic() - begin < 2


def test_one_client_serves_many_threads(server: Server) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        body = json.dumps({"id": request.path.rpartition("/")[2]}).encode()
        request.send_response(200)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    server.behaviour = answer
    with _client(server.url) as client, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(client.get_pod, [f"p{n}" for n in range(100)]))
    assert [pod and pod.id for pod in found] == [f"p{n}" for n in range(100)]
