"""What a policy is told of steps, and what it need not be told of."""

from __future__ import annotations

from types import SimpleNamespace

from eagleray.engine.scheduling.plan import StepResult
from eagleray.engine.speculation.accounts import GuessAccounts
from eagleray.engine.speculation.controller import FixedDrafts, StepTimes
from eagleray.engine.speculation.tree import DraftShape

GUESSES = DraftShape(2)


class Content:
    """Implements ``DraftPolicy``: need not be told of three steps after each that it is told of."""

    may_defer = False

    def __init__(self) -> None:
        always = FixedDrafts(GUESSES)
        self.choose, self.slots_needed = always.choose, always.slots_needed
        self.note_acceptance = always.note_acceptance
        self.told: list[StepTimes] = []
        self.num_content = 3  # steps

    def note_times(self, times: StepTimes) -> int:
        self.told.append(times)
        return self.num_content


class Steps:
    """Numbered by the time that they took."""

    def __init__(self) -> None:
        self.policy = Content()
        self.accounts = GuessAccounts(self.policy)
        self.number = 0
        self.likes: list[bool | None] = []  # the one before

    def end(self, num_requests: int, shape: DraftShape | None = None, is_decode_only: bool = True) -> bool:
        """Whether the policy was told of one more."""
        num_told = len(self.policy.told)
        run = SimpleNamespace(num_rows=1, num_deferred=0, defers=False, may_draft=False, draft=None)
        plan = SimpleNamespace(runs=[run] * num_requests, shape=shape, is_decode_only=is_decode_only)
        self.number += 1
        self.accounts.note(plan, StepResult(verify_s=float(self.number)), [], outside_s=0.0)
        if len(self.policy.told) == num_told:
            return False
        assert self.policy.told[-1].verify_s == self.number and self.policy.told[-1].num_requests == num_requests
        return True


def test_a_policy_is_not_told_of_as_many_plain_steps_as_it_has_said() -> None:
    steps = Steps()
    assert [steps.end(2) for _ in range(9)] == [True, False, False, False] * 2 + [True]


def test_it_is_told_at_once_of_another_number_of_requests() -> None:
    steps = Steps()
    assert [steps.end(num_requests) for num_requests in (2, 2, 3, 3, 2)] == [True, False, True, False, True]


def test_it_is_told_of_every_step_that_guesses_or_verifies() -> None:
    steps = Steps()
    told = [steps.end(2), steps.end(2), steps.end(2, GUESSES), steps.end(2, GUESSES), steps.end(2), steps.end(2)]
    assert told == [True, False, True, True, True, False]  # the last but one has the guesses of the one before


def test_after_a_step_that_computed_prompts_it_is_told_again() -> None:
    steps = Steps()
    assert [steps.end(2), steps.end(2), steps.end(2, is_decode_only=False), steps.end(2)] == [True, False, False, True]


def test_a_step_is_like_the_one_before_if_that_verified_what_the_same_shape_had_guessed() -> None:
    steps = Steps()
    steps.policy.num_content = 0
    for shape, is_decode_only in (
        (None, True),
        (GUESSES, True),
        (GUESSES, True),  # the first that verifies
        (None, True),
        (None, True),  # the first that does not
        (None, True),
        (None, False),
        (GUESSES, True),
    ):
        steps.policy.told.clear()
        steps.end(2, shape, is_decode_only)
        steps.likes.append(steps.policy.told[-1].is_like_the_last if steps.policy.told else None)
    assert steps.likes == [True, True, False, True, False, True, None, True]
