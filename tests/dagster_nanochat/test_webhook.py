"""The message at the end of a paid run, as a real HTTP server gets it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import dagster as dg
import pytest
from standins import webhook_receiver

from dagster_nanochat.webhook import told_at_the_end
from nanochat.failures import AttemptFailed, Failure
from nanochat.store import FileStore
from nanochat.store.leases import utc_now
from nanochat.store.ledger import LedgerEntry, entries, entry_key, write_entry

TOKENS = ["20261126T010000-00000001", "20261126T020000-00000002"]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[webhook_receiver.Receiver]:
    with webhook_receiver.serve() as one:
        monkeypatch.setenv("NANOCHAT_WEBHOOK_URL", one.url)
        yield one


@pytest.fixture
def run() -> SimpleNamespace:
    """A run's context, as far as a message needs it, with the warnings it logged."""
    warnings: list[str] = []
    return SimpleNamespace(
        run=SimpleNamespace(run_id="the-run"), log=SimpleNamespace(warning=warnings.append), warnings=warnings
    )


@pytest.fixture
def paid(tmp_store: FileStore) -> FileStore:
    """A ledger in which two attempts have had a machine for half an hour each, at $3 an hour."""
    for token in TOKENS:
        entry = LedgerEntry(
            token=token,
            provider="runpod",
            model="d4",
            stage="base",
            prefix="stages/base/x",
            offer="1 x H100",
            usd_per_h=3.0,
            user="me",
            host="here",
            asked_at=utc_now() - timedelta(minutes=30),
            deadline_at=utc_now(),
            machine="pod",
            ended_at=utc_now(),
        )
        write_entry(tmp_store, entry)
    return tmp_store


def test_a_good_end_is_told_with_its_dollars_and_its_page(
    receiver: webhook_receiver.Receiver,
    run: SimpleNamespace,
    paid: FileStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOCHAT_UI_URL", "https://dagster.example/")
    machines: list[str] = []
    with told_at_the_end(run, paid, "d4", "base", machines):
        machines += TOKENS
    (message,) = receiver.messages
    assert message.pop("text") == ("base of d4 succeeded for $3.00 (https://dagster.example/runs/the-run)")
    assert message.pop("dollars") == pytest.approx(3.0, abs=0.01)
    assert message == {
        "model": "d4",
        "stage": "base",
        "result": "succeeded",
        "reason": "",
        "link": "https://dagster.example/runs/the-run",
    }


@pytest.mark.parametrize(
    ("error", "result", "reason"),
    [
        (
            dg.Failure("base of d4 ended with BUDGET: too dear\nand more", metadata={"failure": "BUDGET"}),
            "BUDGET",
            "too dear",
        ),
        (AttemptFailed(Failure.NO_CAPACITY, "nothing left"), "NO_CAPACITY", "nothing left"),
        (dg.DagsterExecutionInterruptedError("x"), "CANCELLED", "the run was terminated"),
        (
            RuntimeError("a fault of ours " * 100),
            "FAILED",
            ("RuntimeError: " + "a fault of ours " * 100)[:300],
        ),
    ],
)
def test_a_bad_end_is_told_with_its_word_and_goes_on(
    receiver: webhook_receiver.Receiver,
    run: SimpleNamespace,
    paid: FileStore,
    error: BaseException,
    result: str,
    reason: str,
) -> None:
    with pytest.raises(type(error)), told_at_the_end(run, paid, "d4", "base", TOKENS[:1]):
        raise error
    (message,) = receiver.messages
    assert (message["result"], message["reason"]) == (result, reason)
    assert message["dollars"] == pytest.approx(1.5, abs=0.01)


def test_a_run_that_rented_nothing_and_one_without_an_address_say_nothing(
    receiver: webhook_receiver.Receiver,
    run: SimpleNamespace,
    paid: FileStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with told_at_the_end(run, paid, "quick", "base", ["20261126T030000-00000003"]):
        pass
    (asked, *_) = entries(paid)
    write_entry(paid, asked.model_copy(update={"token": TOKENS[0][:-1] + "9", "machine": None}))
    with told_at_the_end(run, paid, "d4", "base", [TOKENS[0][:-1] + "9"]):
        pass
    monkeypatch.delenv("NANOCHAT_WEBHOOK_URL")
    with told_at_the_end(run, paid, "d4", "base", TOKENS):
        pass
    assert receiver.messages == []
    assert run.warnings == []


def test_a_ledger_that_cannot_be_read_fails_nothing(
    receiver: webhook_receiver.Receiver, run: SimpleNamespace, paid: FileStore
) -> None:
    paid.put(entry_key(TOKENS[0]), b"{")
    with told_at_the_end(run, paid, "d4", "base", TOKENS):
        pass
    assert receiver.messages == []
    assert "what the run has cost cannot be read" in run.warnings[0]


@pytest.mark.parametrize("how", ["refuses", "is gone", "is no address"])
def test_a_message_that_is_not_taken_is_a_warning_without_the_address(
    receiver: webhook_receiver.Receiver,
    run: SimpleNamespace,
    paid: FileStore,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if how == "refuses":
        receiver.status = 404
    else:
        url = (
            f"http://127.0.0.1:9/{webhook_receiver.PATH}"
            if how == "is gone"
            else f"ftp://{webhook_receiver.PATH}"
        )
        monkeypatch.setenv("NANOCHAT_WEBHOOK_URL", url)
    with caplog.at_level(logging.INFO), told_at_the_end(run, paid, "d4", "base", TOKENS):
        pass
    (warning,) = run.warnings
    assert "the message to NANOCHAT_WEBHOOK_URL was not taken: " in warning
    assert "base of d4 succeeded for $3.00" in warning
    assert webhook_receiver.PATH not in warning + caplog.text
