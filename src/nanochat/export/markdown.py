"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_TABLE_ROWS = 50


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, every value short."""
    if not rows:
        return "(none)"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows[:MAX_TABLE_ROWS]:
        lines.append("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    if len(rows) > MAX_TABLE_ROWS:
        lines.append(f"\n… {len(rows) - MAX_TABLE_ROWS} more rows")
    return "\n".join(lines)


def number(value: float) -> str:
    """Four digits that count, and no exponent where people expect none: 25,740 and 0.0125."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    text = "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ⏎ ")
