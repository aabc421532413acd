from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eagleray.engine.speculation.ngram import look_up


def test_what_followed_the_latest_earlier_occurrence_is_proposed() -> None:
    assert look_up([1, 2, 9, 1, 2, 7, 8, 1, 2], 2, min_ngram=1, max_ngram=3) == [7, 8]


def test_the_longest_match_wins() -> None:
    assert look_up([3, 1, 2, 5, 1, 2, 6, 3, 1, 2], 1, min_ngram=1, max_ngram=3) == [5]


def test_an_occurrence_may_overlap_the_end() -> None:
    assert look_up([4, 4, 4], 3, min_ngram=1, max_ngram=2) == [4]


def test_nothing_is_proposed_without_an_occurrence() -> None:
    assert look_up([1, 2, 3], 3, min_ngram=1, max_ngram=3) == []
    assert look_up([1], 3, min_ngram=1, max_ngram=3) == []


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 4))
def test_a_proposal_is_a_passage_that_followed_the_last_tokens(token_ids: list[int], num_tokens: int) -> None:
    proposed = look_up(token_ids, num_tokens, min_ngram=1, max_ngram=3)
    occurrences = [i for i in range(1, len(token_ids)) if token_ids[i - 1] == token_ids[-1]]
    assert bool(proposed) == bool(occurrences)
    assert not proposed or any(token_ids[i : i + len(proposed)] == proposed for i in occurrences)
