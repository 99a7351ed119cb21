"""Clients that leave, that do not read, that send slowly, too much or too late."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from standins.served_script import LONG, MESSAGES, TEXT, Served
from standins.waiting import wait_for

from nanochat.serving import server
from nanochat.serving.gate import Limits

pytestmark = pytest.mark.timeout(60)


def events_of(stream: str) -> list[str]:
    """The data of each event of a whole stream."""
    assert stream.endswith("\n\n")
    return [event.removeprefix("data: ") for event in stream[:-2].split("\n\n")]


@pytest.mark.parametrize("rude", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_its_place_within_a_second(
    served: Callable[..., Served], stream: bool, rude: bool
) -> None:
    one = served(max_rows=1, context=LONG + 100, max_tokens=LONG)
    one.model.pace_s = 0.05
    asked = {"model": "tiny", "prompt": "Long", "stream": stream}
    with one.connection("/v1/completions", **asked) as running:
        wait_for(lambda: one.scheduler.stats().running == 1)
        with one.connection("/v1/completions", **asked) as queued:
            wait_for(lambda: one.scheduler.stats().waiting == 1)
            leave(queued, rude)
        left_s = time.monotonic()
        wait_for(lambda: one.scheduler.stats().waiting == 0, within_s=1)
        assert one.scheduler.stats().running == 1
        leave(running, rude)
        wait_for(lambda: one.scheduler.stats().running == 0, within_s=1)
    assert time.monotonic() - left_s < 2
    wait_for(lambda: one.doors.open == 0, within_s=1)
    assert not one.doors.breaks
    one.model.pace_s = 0
    assert one.post().json()["choices"][0]["message"]["content"] == TEXT


def leave(client: socket.socket, rude: bool) -> None:
    if rude:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_a_client_that_does_not_read_keeps_nobody_waiting_and_is_given_up(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STALLED_S", 1.0)
    one = served(max_rows=4, context=LONG + 100, max_tokens=LONG)
    asked = {"model": "tiny", "prompt": "Long", "stream": True, "logprobs": 5}
    with one.connection("/v1/completions", **asked) as stalled:
        wait_for(lambda: one.doors.open == 1)
        assert one.post().json()["choices"][0]["message"]["content"] == TEXT
        wait_for(lambda: one.doors.open == 0, within_s=20)
        wait_for(lambda: one.scheduler.stats().running == 0, within_s=1)
        wait_for(lambda: not one.server.server_state.connections, within_s=5)
        # What was in the system's buffers, and not all of it.
        assert not b"".join(iter(lambda: stalled.recv(65536), b"")).endswith(b"0\r\n\r\n")


def test_a_client_that_reads_slowly_gets_all_of_it(served: Callable[..., Served]) -> None:
    one = served(context=LONG + 100, max_tokens=LONG)
    asked = {"model": "tiny", "prompt": "Long", "stream": True, "logprobs": 5}
    got = b""
    with one.connection("/v1/completions", **asked) as slow:
        wait_for(lambda: one.scheduler.stats().completion_tokens == LONG)  # all of it is written
        assert one.doors.open == 1  # and not sent
        while not got.endswith(b"0\r\n\r\n"):
            got += slow.recv(65536)
    pieces = [json.loads(line[6:]) for line in got.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "x" * LONG
    assert sum(len(piece["choices"][0]["logprobs"]["tokens"]) for piece in pieces[:-1]) == LONG
    assert len(pieces) < LONG - 500  # what came while it did not read is one event


def test_a_body_that_does_not_come_is_not_waited_for(served: Callable[..., Served]) -> None:
    one = served(limits=Limits(body_s=0.3))
    host, port = one.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
    wait_for(lambda: one.doors.open == 0, within_s=1)


def test_a_connection_that_asks_nothing_is_closed(
    served: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SILENT_S", 0.3)
    one = served()
    one.gate.clear()
    with one.connection() as waiting, socket.socket() as silent:
        wait_for(lambda: one.doors.open == 1)
        host, port = one.url.removeprefix("http://").split(":")
        silent.connect((host, int(port)))
        silent.sendall(b"POST /v1/comp")
        silent.settimeout(10)
        assert silent.recv(10) == b""
        one.gate.set()
        assert waiting.recv(100).startswith(b"HTTP/1.1 200")


def test_one_clients_requests_may_be_limited_and_it_is_told_when_to_come_again(
    served: Callable[..., Served],
) -> None:
    one = served(api_keys=("a", "b"), limits=Limits(client_requests_per_minute=2))
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
    for _ in range(2):
        one.client("a").chat.completions.create(**asked)
    with pytest.raises(openai.RateLimitError) as refused:
        one.client("a").chat.completions.create(**asked)
    assert refused.value.response.headers["Retry-After"] == "30"
    assert refused.value.code == "rate_limit_exceeded"
    one.client("a").models.list()  # no question
    one.client("b").chat.completions.create(**asked)
    figures = httpx.get(f"{one.url}/metrics").text
    assert 'nanochat_refused_total{status="429"} 1.0' in figures
    assert "nanochat_open 0.0" in figures


def test_one_client_may_have_so_many_requests_open(served: Callable[..., Served]) -> None:
    one = served(limits=Limits(client_open_requests=1))
    one.gate.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(one.post)
        wait_for(lambda: one.doors.open == 1)
        refused = one.post()
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        one.gate.set()
        assert first.result().status_code == 200
    assert one.post().status_code == 200


def test_an_answer_that_takes_too_long_ends_as_one_that_is_too_long(served: Callable[..., Served]) -> None:
    one = served(request_s=0.5, context=LONG + 100, max_tokens=LONG)
    one.model.pace_s = 0.05
    asked = {"model": "tiny", "prompt": "Long"}
    whole = one.post("/v1/completions", **asked).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    assert 1 < len(whole["text"]) < 50
    *_, last, done = events_of(one.post("/v1/completions", **asked, stream=True).text)
    assert json.loads(last)["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"


def test_a_request_whose_turn_did_not_come_in_time_is_refused(served: Callable[..., Served]) -> None:
    one = served(request_s=0.3, max_rows=1)
    one.gate.clear()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(one.post)
        wait_for(lambda: one.scheduler.stats().requests == 1)
        whole, stream = pool.submit(one.post), pool.submit(one.post, stream=True)
        wait_for(lambda: one.scheduler.stats().requests == 3)
        time.sleep(0.5)
        one.gate.set()
        assert first.result().json()["choices"][0]["finish_reason"] == "length"
        refused = whole.result()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["error"]["code"] == "timed_out"
        assert json.loads(events_of(stream.result().text)[-1])["error"]["code"] == "timed_out"


def test_told_to_end_it_answers_what_it_has_accepted_and_tells_others_so(
    served: Callable[..., Served],
) -> None:
    one = served(max_rows=1)
    one.gate.clear()
    with ThreadPoolExecutor() as pool:
        accepted = [pool.submit(one.post, stream=number % 2 == 0) for number in range(4)]
        wait_for(lambda: one.scheduler.stats().requests == 4)
        one.end()
        wait_for(lambda: one.doors.draining)
        refused = one.post()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{one.url}/health").status_code == 503
        assert 'nanochat_requests_total{model="tiny"} 4.0' in httpx.get(f"{one.url}/metrics").text
        one.gate.set()
        answers = [answer.result() for answer in accepted]
    assert [answer.status_code for answer in answers] == [200] * 4
    for answer in answers[1::2]:
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
    for answer in answers[::2]:
        assert events_of(answer.text)[-1] == "[DONE]"
    wait_for(lambda: one.server.should_exit)
    with pytest.raises(httpx.ConnectError):
        wait_for(lambda: one.post() and False, within_s=5)


@pytest.mark.parametrize(("shutdown_s", "signals"), [(0.5, 1), (60.0, 2)])
def test_what_is_not_answered_in_the_time_for_ending_is_broken_off_in_good_order(
    served: Callable[..., Served], shutdown_s: float, signals: int
) -> None:
    one = served(max_rows=1, context=LONG + 100, max_tokens=LONG, shutdown_s=shutdown_s)
    one.model.pace_s = 0.05
    asked = {"model": "tiny", "prompt": "Long", "stream": True}
    with ThreadPoolExecutor() as pool:
        running = pool.submit(one.post, "/v1/completions", **asked)
        wait_for(lambda: one.scheduler.stats().running == 1)
        queued = pool.submit(one.post, "/v1/completions", **asked)
        wait_for(lambda: one.scheduler.stats().waiting == 1)
        for _ in range(signals):
            one.end()
        *_, last, done = events_of(running.result().text)
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
        assert json.loads(events_of(queued.result().text)[-1])["error"]["code"] == "shutting_down"
    wait_for(lambda: one.server.should_exit, within_s=5)
