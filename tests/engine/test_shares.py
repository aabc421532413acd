from __future__ import annotations

from types import SimpleNamespace

import pytest

from eagleray.engine.scheduling.shares import StepBudget, even_shares


def run(num_tokens: int, num_guesses: int = 0, samples: bool = True) -> SimpleNamespace:
    return SimpleNamespace(num_tokens=num_tokens, num_rows=num_tokens + num_guesses, samples=samples)


def test_prompts_get_a_whole_step_where_nobody_decodes_and_half_where_somebody_does() -> None:
    assert StepBudget(9, has_decoding=False).share(100) == 9
    assert StepBudget(9, has_decoding=True).share(100) == 5


def test_several_prompts_share_their_half_and_who_decodes_has_the_rest() -> None:
    budget = StepBudget(8, has_decoding=True)
    budget.take(run(3))
    assert budget.share(3) == 1 and budget.is_left
    budget.take(run(1, num_guesses=2))
    budget.take(run(1))
    assert (budget.share(1), budget.share(5), budget.is_left) == (1, 1, True)
    budget.take(run(1))
    assert (budget.share(1), budget.share(5), budget.is_left) == (0, 0, False)


def test_one_token_of_a_prompt_is_of_its_half_too() -> None:
    budget = StepBudget(8, has_decoding=True)
    budget.take(run(3))
    budget.take(run(1, samples=False))
    assert (budget.share(9), budget.share(1), budget.is_left) == (0, 1, False)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_the_smallest_steps_leave_something_for_prompts(num_rows: int) -> None:
    assert StepBudget(num_rows, has_decoding=True).share(7) == 1


def test_what_one_does_not_want_is_for_the_others() -> None:
    assert even_shares([1, 9, 9], 11) == [1, 5, 5]
