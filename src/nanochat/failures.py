"""The failure vocabulary: every way an attempt can end badly, one word each, everywhere."""

from __future__ import annotations

import enum


class Failure(enum.StrEnum):
    """Why an attempt ended. Only `FAILED` and `BAD_REQUEST` are the user's or our code's to mend."""

    NO_CAPACITY = "NO_CAPACITY"
    NOT_READY = "NOT_READY"
    LOST = "LOST"
    FAILED = "FAILED"
    DEADLINE = "DEADLINE"
    BUDGET = "BUDGET"
    CANCELLED = "CANCELLED"
    BAD_REQUEST = "BAD_REQUEST"


class AttemptFailed(Exception):
    """An attempt ended without a receipt: which failure, and what the machine said."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(f"{failure}: {message}")
        self.failure = failure
        self.message = message
