"""Who comes in, counted by a clock of the test's own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nanochat.serving.errors import ApiError
from nanochat.serving.gate import Gate, Limits


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def scope(*headers: tuple[bytes, bytes], client: str = "127.0.0.1") -> dict[str, Any]:
    return {"type": "http", "headers": list(headers), "client": (client, 1234)}


def refusal(gate: Gate, client: str) -> ApiError:
    with pytest.raises(ApiError) as refused:
        gate.enter(client)
    return refused.value


def test_a_client_may_send_a_minutes_worth_at_once_and_then_at_that_rate() -> None:
    clock = Clock()
    gate = Gate(Limits(client_requests_per_minute=3), clock=clock)
    for _ in range(3):
        gate.enter("a")
    refused = refusal(gate, "a")
    assert (refused.status, refused.headers["Retry-After"]) == (429, "20")
    assert refused.document()["error"]["type"] == "rate_limit_error"
    gate.enter("b")  # another's requests are its own
    clock.now_s += 19.5
    assert refusal(gate, "a").headers["Retry-After"] == "1"
    clock.now_s += 0.6
    gate.enter("a")
    assert refusal(gate, "a").status == 429
    assert gate.open == 5


def test_clients_that_have_not_come_for_a_minute_take_no_memory() -> None:
    clock = Clock()
    gate = Gate(Limits(client_requests_per_minute=1), clock=clock)
    for number in range(1000):
        gate.enter(f"10.0.{number // 256}.{number % 256}")
        gate.leave(f"10.0.{number // 256}.{number % 256}")
        clock.now_s += 1
    assert len(gate._buckets) <= 61
    assert not gate._open_of


def test_what_is_open_has_a_bound_for_one_client_and_for_all() -> None:
    gate = Gate(Limits(open_requests=3, client_open_requests=2))
    gate.enter("a")
    gate.enter("a")
    assert refusal(gate, "a").status == 429
    gate.enter("b")
    refused = refusal(gate, "c")
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    gate.leave("a")
    gate.enter("c")


def test_a_gate_that_drains_lets_nobody_in_and_counts_out() -> None:
    gate = Gate(Limits())
    gate.enter("a")
    gate.drain()
    refused = refusal(gate, "b")
    assert (refused.status, refused.code, refused.headers["Connection"]) == (503, "shutting_down", "close")
    gate.leave("a")
    assert gate.open == 0


def test_a_client_is_its_key_where_keys_are_asked_for_else_its_address() -> None:
    assert Gate(Limits()).client(scope(client="10.1.2.3")) == "10.1.2.3"
    gate = Gate(Limits(), ("first", "zwölf"))
    assert gate.client(scope((b"authorization", b"Bearer first"))) == "key 0"
    assert gate.client(scope((b"authorization", b"bearer " + "zwölf".encode()), client="10.0.0.9")) == "key 1"
    for sent in (b"", b"first", b"Basic first", b"Bearer", b"Bearer firs", b"Bearer first2", b"Bearer \xff"):
        with pytest.raises(ApiError) as refused:
            gate.client(scope((b"authorization", sent)))
        assert refused.value.status == 401
        assert "first" not in refused.value.message


def test_what_is_told_to_break_off_is_told_once_it_registered() -> None:
    gate, told = Gate(Limits()), asyncio.Event()
    gate.breaks.add(told.set)
    gate.break_off()
    assert told.is_set()
