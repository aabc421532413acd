"""What came of guesses, added up."""

from __future__ import annotations

import msgspec
import pytest

from eagleray.core.acceptance import Acceptance, total_acceptance


def step(depth: int, num_accepted: int, num_draft_tokens: int | None = None) -> Acceptance:
    guesses = depth if num_draft_tokens is None else num_draft_tokens
    return Acceptance.of_step(guesses, depth, num_accepted, verify_s=0.5, draft_s=0.25)


def test_counts_and_times_add_up() -> None:
    total = total_acceptance([step(3, 2), None, step(3, 0), step(3, 3)])
    assert total == Acceptance(
        num_steps=3,
        num_draft_tokens=9,
        num_accepted_tokens=5,
        drafts_per_position=(3, 3, 3),
        accepted_per_position=(2, 2, 1),
        verify_s=1.5,
        draft_s=0.75,
    )


def test_a_position_is_judged_by_the_drafts_that_reached_it() -> None:
    total = total_acceptance([step(1, 1), step(1, 0), step(3, 3), step(3, 1)])
    assert total is not None
    assert total.rate_per_position == (3 / 4, 1 / 2, 1 / 2)


def test_steps_without_guesses_count_as_steps_and_not_as_drafts() -> None:
    total = total_acceptance([step(0, 0), step(2, 2), step(0, 0), step(2, 1)])
    assert total is not None
    assert (total.num_steps, total.num_drafts) == (4, 2)
    assert (total.tokens_per_step, total.acceptance_length) == (1.75, 2.5)


def test_of_a_tree_all_guesses_were_drafted_and_a_path_was_accepted() -> None:
    tree = step(depth=2, num_draft_tokens=6, num_accepted=2)
    assert (tree.num_draft_tokens, tree.num_accepted_tokens, tree.rate_per_position) == (6, 2, (1.0, 1.0))


@pytest.mark.parametrize("parts", [[], [None, None]])
def test_nothing_adds_up_to_nothing(parts: list[None]) -> None:
    assert total_acceptance(parts) is None


def test_where_nothing_was_guessed_a_step_brings_one_token() -> None:
    nothing = Acceptance()
    assert (nothing.tokens_per_step, nothing.acceptance_length, nothing.rate_per_position) == (1.0, 1.0, ())


def test_it_travels() -> None:
    sent = step(3, 2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Acceptance) == sent
