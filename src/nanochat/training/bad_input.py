"""What a person can mend by other input."""

from __future__ import annotations


class BadInput(ValueError):
    """Input that nothing can be trained on: what it is, what is wrong with it, the next step."""
