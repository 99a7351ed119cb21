"""Tables for people."""

from __future__ import annotations

import pytest

from nanochat.export.markdown import number, table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (25740.4, "25,740"),
        (0.0125, "0.0125"),
        (1.51149, "1.511"),
        (1600.0, "1,600"),
        (999.96, "1000"),
        (3, "3"),
    ],
)
def test_a_number_has_four_digits_that_count_and_no_exponent(value: float, shown: str) -> None:
    assert number(value) == shown


def test_what_would_break_a_table_is_written_otherwise() -> None:
    assert table([{"a": "x|y\nz", "b": None}]).splitlines()[-1] == r"| x\|y ⏎ z |  |"


def test_a_long_table_says_how_much_is_left_out() -> None:
    assert table([{"n": n} for n in range(53)]).endswith("… 3 more rows")
