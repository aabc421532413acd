from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.text.stop import StopChecker

LETTERS = st.text("ab<é👩", max_size=12)
STOPS = st.lists(st.text("ab<é👩", min_size=1, max_size=4), min_size=1, max_size=3)


def run(checker: StopChecker, pieces: list[str]) -> tuple[str, str | None]:
    released = ""
    for piece in pieces:
        text, match = checker.push(piece)
        released += text
        if match is not None:
            return released, match
    return released + checker.flush(), None


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By the definition: the first end of any stop string, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS, include=st.booleans())
def test_any_split_of_a_text_stops_at_the_same_place(pieces: list[str], stops: list[str], include: bool):
    assert run(StopChecker(stops, include), pieces) == expected("".join(pieces), stops, include)


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_no_part_of_a_stop_string_is_shown_before_it_completes(pieces: list[str], stops: list[str]):
    final, _ = expected("".join(pieces), stops, include=False)
    checker, released = StopChecker(stops), ""
    for piece in pieces:
        text, match = checker.push(piece)
        released += text
        assert final.startswith(released)
        if match is not None:
            break


def test_only_what_may_become_a_stop_string_is_held_back():
    checker = StopChecker(["<end>"])
    assert checker.push("text <") == ("text ", None)
    assert checker.push("b><e") == ("<b>", None)
    assert checker.flush() == "<e"


def test_text_passes_untouched_without_stop_strings():
    assert StopChecker([]).push("anything") == ("anything", None)


@pytest.mark.parametrize(("stops", "kept", "match"), [(["abcd", "bc"], "xa", "bc"), (["bc", "abc"], "x", "abc")])
def test_the_stop_string_that_completes_first_counts_and_then_the_longer(stops: list[str], kept: str, match: str):
    assert run(StopChecker(stops), list("xabcd")) == (kept, match)


def test_a_stop_string_that_may_not_count_yet_is_let_through():
    checker = StopChecker(["ab"])
    assert checker.push("xab", may_stop=False) == ("xab", None)
    assert checker.push("ab") == ("", "ab")
