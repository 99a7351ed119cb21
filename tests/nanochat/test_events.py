"""The event stream: whole lines, from a cursor, with nothing lost."""

from __future__ import annotations

import json

from nanochat.events import Cursor, EventStream, EventWriter, encode_event
from nanochat.supervisor import EventShipper


def test_a_reader_goes_on_where_it_stopped(tmp_store) -> None:
    stream = EventStream(tmp_store, "a/events.jsonl")
    assert stream.read(Cursor()) == ([], Cursor())
    tmp_store.append("a/events.jsonl", encode_event("step", step=1) + encode_event("step", step=2))
    events, cursor = stream.read(Cursor())
    assert [event["step"] for event in events] == [1, 2]
    tmp_store.append("a/events.jsonl", encode_event("step", step=3))
    events, cursor = stream.read(cursor)
    assert [event["step"] for event in events] == [3]
    assert stream.read(cursor)[0] == []


def test_half_a_line_waits_for_its_end(tmp_store) -> None:
    line = encode_event("log", message="whole")
    tmp_store.append("e", line[:10])
    events, cursor = EventStream(tmp_store, "e").read(Cursor())
    assert events == []
    tmp_store.append("e", line[10:])
    assert EventStream(tmp_store, "e").read(cursor)[0][0]["message"] == "whole"


def test_a_damaged_line_is_reported_and_the_rest_is_read(tmp_store) -> None:
    tmp_store.append("e", b"{broken\n" + encode_event("step", step=1))
    warning, step = EventStream(tmp_store, "e").all()
    assert (warning["type"], warning["level"]) == ("log", "warning")
    assert step["step"] == 1


def test_numbers_that_are_not_finite_become_null() -> None:
    metrics = {"val_bpb": float("nan"), "counts": [1, float("inf")], "name": "x"}
    event = json.loads(encode_event("eval", loss=float("nan"), metrics=metrics))
    assert event["loss"] is None
    assert event["metrics"] == {"val_bpb": None, "counts": [1, None], "name": "x"}


def test_the_shipper_joins_the_trainers_events_with_its_own(tmp_store, tmp_path) -> None:
    spool = tmp_path / "spool.jsonl"
    shipper = EventShipper(tmp_store, "e", spool)
    shipper.emit("attempt_started")
    shipper.ship()
    writer = EventWriter(spool)
    writer.emit("step", step=1)
    with spool.open("ab") as file:
        file.write(b'{"type": "step", "st')
    shipper.ship()
    with spool.open("ab") as file:
        file.write(b'ep": 2}\n')
    shipper.ship()
    types = [(event["type"], event.get("step")) for event in EventStream(tmp_store, "e").all()]
    assert types == [("attempt_started", None), ("step", 1), ("step", 2)]
