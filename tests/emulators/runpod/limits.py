"""Quotas per minute, hour and day, and the headers that tell them."""

from __future__ import annotations

import math
import time

from emulators.runpod.problems import Problem
from emulators.runpod.settings import Settings

_WINDOWS_S = {"minute": 60, "hour": 3600, "day": 86_400}


class RateLimits:
    """Counts requests in fixed windows. All keys of the account count together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._since = dict.fromkeys(_WINDOWS_S, time.monotonic())
        self._used = dict.fromkeys(_WINDOWS_S, 0)

    def count(self) -> dict[str, str]:
        """Count a request; returns the headers of its answer. Raises Problem 429 where it is too many."""
        now = time.monotonic()
        quotas = {window: getattr(self._settings, f"quota_per_{window}") for window in _WINDOWS_S}
        for window, seconds in _WINDOWS_S.items():
            if now - self._since[window] >= seconds:
                self._since[window], self._used[window] = now, 0
        resets = {
            window: math.ceil(seconds - (now - self._since[window])) for window, seconds in _WINDOWS_S.items()
        }
        full = next((window for window in _WINDOWS_S if self._used[window] >= quotas[window]), None)
        if full is None:
            for window in _WINDOWS_S:
                self._used[window] += 1
        headers = {
            "RateLimit": ", ".join(
                f'"{window}";r={quotas[window] - self._used[window]};t={resets[window]}'
                for window in _WINDOWS_S
            ),
            "RateLimit-Policy": ", ".join(
                f'"{window}";q={quotas[window]};w={seconds}' for window, seconds in _WINDOWS_S.items()
            ),
        }
        if full is not None:
            raise Problem(
                429,
                f"rate limit exceeded for the {full} window",
                headers={**headers, "Retry-After": str(resets[full])},
            )
        return headers
