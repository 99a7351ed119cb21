"""The ledger: money that is being spent is in it at any moment, and never less than was billed."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from nanochat.store import FileStore
from nanochat.store.ledger import (
    LedgerEntry,
    change_entry,
    entries,
    entry_key,
    read_entry,
    stage_dollars,
    write_entry,
)

START = datetime.datetime(2026, 11, 26, 12, 0, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)


def _entry(token: str = "20261126T120000-00000001", **fields: Any) -> LedgerEntry:
    return LedgerEntry(
        **{
            "token": token,
            "provider": "runpod",
            "model": "d4",
            "stage": "base",
            "prefix": "stages/base/aaaaaaaaaaaa",
            "offer": "1 x NVIDIA L40S",
            "usd_per_h": 0.8,
            "user": "somebody",
            "host": "laptop",
            "asked_at": START,
            "deadline_at": START + 3 * HOUR,
            **fields,
        }
    )


@pytest.fixture
def store(tmp_path) -> FileStore:
    return FileStore(tmp_path / "store")


def _closed(store: FileStore, **fields: Any) -> LedgerEntry | None:
    return change_entry(store, _entry().token, lambda entry: fields if entry.open else {})


def test_a_machine_costs_from_the_asking_until_it_is_seen_to_be_gone(store: FileStore) -> None:
    write_entry(store, _entry())
    assert read_entry(store, _entry().token).dollars(START + HOUR) == 0  # nobody had it yet
    write_entry(store, _entry(in_doubt=True))
    assert read_entry(store, _entry().token).dollars(START + HOUR) == pytest.approx(0.8)
    write_entry(store, _entry(machine="pod1"))
    assert read_entry(store, _entry().token).dollars(START + HOUR) == pytest.approx(0.8)
    closed = _closed(store, outcome="finished", ended_at=START + 2 * HOUR)
    assert closed == read_entry(store, _entry().token)
    assert (closed.open, closed.outcome) == (False, "finished")
    assert closed.dollars(START + 99 * HOUR) == pytest.approx(1.6)


def test_a_change_sees_what_others_have_changed_meanwhile(store: FileStore) -> None:
    assert _closed(store, outcome="finished") is None
    write_entry(store, _entry(machine="pod1"))
    seen = []

    def change(entry: LedgerEntry) -> dict[str, Any]:
        seen.append(entry.outcome)
        if len(seen) == 1:  # somebody else is quicker
            _closed(store, outcome="finished", ended_at=START + HOUR)
        return {"twins": {**entry.twins, "pod2": 0.5}}

    changed = change_entry(store, _entry().token, change)
    assert seen == ["", "finished"]
    assert (changed.outcome, changed.ended_at, changed.twins) == ("finished", START + HOUR, {"pod2": 0.5})
    assert _closed(store, outcome="LOST").outcome == "finished"


def test_twins_are_added_and_a_bill_is_the_last_word() -> None:
    ended = {"machine": "pod1", "ended_at": START + HOUR, "twins": {"pod2": 0.2}}
    assert _entry(**ended).dollars() == pytest.approx(1.0)
    assert _entry(**ended, billed_usd=0.93).dollars() == 0.93


def test_entries_lie_by_the_month_of_their_token(store: FileStore) -> None:
    tokens = ["20261031T235959-00000001", "20261101T000000-00000002", "20261126T120000-00000003"]
    for token in reversed(tokens):
        write_entry(store, _entry(token))
    assert entry_key(tokens[0]) == f"ledger/2026-10/{tokens[0]}.json"
    assert [entry.token for entry in entries(store)] == tokens
    assert [entry.token for entry in entries(store, "2026-11")] == tokens[1:]


def test_a_stages_dollars_are_those_of_its_own_attempts(store: FileStore) -> None:
    mine, others = "20261126T120000-00000001", "20261126T120000-00000002"
    write_entry(store, _entry(mine, machine="pod1", ended_at=START + HOUR))
    write_entry(store, _entry(others, machine="pod2", ended_at=START + HOUR, prefix="stages/sft/b"))
    assert stage_dollars(store, _entry().prefix, [mine, others, "20261126T120000-0000000f"]) == {
        mine: pytest.approx(0.8)
    }
