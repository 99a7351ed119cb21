from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.inference.stops import StopFilter


def passed(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stop_filter, text = StopFilter(stops), ""
    for piece in pieces:
        text += stop_filter.read(piece)
        if stop_filter.found is not None:
            return text, stop_filter.found
    return text + stop_filter.flush(), None


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "found"),
    [
        (["END"], ["abc END def"], "abc ", "END"),
        (["END"], ["abc E", "N", "D"], "abc ", "END"),
        (["END"], ["E", "NE", "NDx"], "EN", "END"),
        (["END"], ["abc EN"], "abc EN", None),
        (["aab"], ["aa", "a", "b"], "a", "aab"),
        (["\n\n", "x"], ["a\n", "b\n", "\nx"], "a\nb", "\n\n"),
        (["abcd", "bc"], ["abcd"], "a", "bc"),
        (["b", "ab"], ["cab"], "c", "ab"),
        ([], ["abc"], "abc", None),
    ],
)
def test_text_ends_before_the_stop_string(
    stops: list[str], pieces: list[str], text: str, found: str | None
) -> None:
    assert passed(stops, pieces) == (text, found)


def test_text_comes_as_soon_as_it_can_be_no_stop_string() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.read(piece) for piece in ("so E", "N", "x E", "!")] == ["so ", "", "ENx ", "E!"]


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=3), max_size=8),
)
def test_where_text_is_cut_into_pieces_makes_no_difference(stops: list[str], pieces: list[str]) -> None:
    text, found = passed(stops, list("".join(pieces)))
    assert passed(stops, pieces) == (text, found)
    if found is None:
        assert text == "".join(pieces)
        assert not any(stop in text for stop in stops)
    else:
        assert "".join(pieces).startswith(text + found)
        assert not any(stop in text for stop in stops)
