"""Stop strings: text is held back until it can no longer become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on, up to the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def read(self, text: str) -> str:
        """The text that is certain now: not the stop string, nor what may be the start of one.

        Sets `found` when a stop string is complete; nothing more is to be read then.
        """
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length]
        self._held = ""
        return text

    def flush(self) -> str:
        """What was held back, now that no more can follow it."""
        held, self._held = self._held, ""
        return held
