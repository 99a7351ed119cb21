"""The ledger: what counts as spent, and changes that do not lose each other."""

from __future__ import annotations

import datetime
import threading
from typing import Any

import pytest

from nanochat.store import ObjectStore
from nanochat.store.ledger import (
    LedgerEntry,
    change_entry,
    entries,
    entry_key,
    read_entry,
    stage_dollars,
    write_entry,
)

ASKED = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)


def entry(**fields: Any) -> LedgerEntry:
    known = {
        "token": "20261101T000000-00000000",
        "provider": "p",
        "model": "quick",
        "stage": "base",
        "prefix": "stages/base/f",
        "offer": "one",
        "usd_per_h": 2.0,
        "user": "u",
        "host": "h",
        "asked_at": ASKED,
        "deadline_at": ASKED + HOUR,
        "ended_at": ASKED + HOUR,
    }
    return LedgerEntry.model_validate({**known, **fields})


@pytest.mark.parametrize(
    ("fields", "usd"),
    [
        ({}, 0.0),
        ({"machine": "m"}, 2.0),
        ({"in_doubt": True}, 2.0),
        ({"machine": "m", "twins": {"a": 0.5, "b": 0.25}}, 2.75),
        ({"machine": "m", "twins": {"a": 0.5}, "billed_usd": 1.5}, 1.5),
    ],
)
def test_what_was_never_had_costs_nothing_and_what_is_in_doubt_counts(
    fields: dict[str, Any], usd: float
) -> None:
    assert entry(**fields).dollars() == usd


def test_changes_made_at_the_same_time_are_all_kept(store: ObjectStore) -> None:
    token = entry().token
    write_entry(store, entry())

    def add(name: str) -> None:
        change_entry(store, token, lambda now: {"twins": {**now.twins, name: 1.0}})

    threads = [threading.Thread(target=add, args=(f"twin {number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = read_entry(store, token)
    assert kept is not None
    assert len(kept.twins) == 6


def test_there_is_nothing_to_change_where_there_is_no_entry(store: ObjectStore) -> None:
    assert change_entry(store, entry().token, lambda now: {"outcome": "finished"}) is None


def test_entries_lie_by_the_month_of_their_token(store: ObjectStore) -> None:
    tokens = ["20261031T235959-00000001", "20261101T000000-00000002", "20261126T120000-00000003"]
    for token in reversed(tokens):
        write_entry(store, entry(token=token))
    assert entry_key(tokens[0]) == f"ledger/2026-10/{tokens[0]}.json"
    assert [found.token for found in entries(store)] == tokens
    assert [found.token for found in entries(store, "2026-11")] == tokens[1:]


def test_a_stages_dollars_are_those_of_its_own_attempts(store: ObjectStore) -> None:
    mine, others = "20261126T120000-00000001", "20261126T120000-00000002"
    write_entry(store, entry(token=mine, machine="m"))
    write_entry(store, entry(token=others, machine="n", prefix="stages/sft/b"))
    assert stage_dollars(store, "stages/base/f", [mine, others, "20261126T120000-0000000f"]) == {mine: 2.0}
