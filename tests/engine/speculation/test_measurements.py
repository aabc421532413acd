"""What the controller makes of what it has measured."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from eagleray.engine.speculation.measurements import Costs, GuessAcceptance, TrialLosses, quantile


@pytest.mark.parametrize("count", [6, 10, 25])
def test_few_values_say_on_average_what_many_do(count: int) -> None:
    chance = random.Random(count)
    found = fmean(quantile([chance.random() for _ in range(count)], 0.15) for _ in range(20_000))
    assert found == pytest.approx(0.15, abs=0.005)


def test_of_too_few_values_the_lowest_counts_and_of_one_that_one() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.15) == 1.0
    assert quantile([4.0], 0.15) == 4.0
    assert quantile([4.0, 8.0], 0.95) == 8.0


def test_sizes_with_too_few_measurements_follow_from_the_others() -> None:
    costs = Costs()
    for step in range(8):
        costs.note(1, 1.0, step)
        costs.note(8, 1.7, step)
    for step in range(2):
        costs.note(4, 1.6, step)
    assert costs.at(4, otherwise=0.0) == 1.6
    assert costs.at(4, otherwise=0.0, enough=8) == pytest.approx(1.3)
    assert costs.at(4, otherwise=0.5, enough=9) == 0.5


def test_measurements_that_scatter_are_told_from_those_that_were_disturbed() -> None:
    chance, costs = random.Random(0), Costs()
    for step in range(25):
        costs.note(1, chance.uniform(0.8, 1.2), step)
        costs.note(2, chance.choice((1.0, 30.0)), step)
    assert costs.is_disturbed(2) and not costs.is_disturbed(1) and not costs.is_disturbed(3)


def test_trials_wait_until_what_they_have_lost_is_paid_for() -> None:
    losses = TrialLosses()
    for _ in range(3):
        losses.note(2.5, worth_steps=1.5)
    assert losses.leave_room(2.0, paid_steps=5.01) and not losses.leave_room(2.0, paid_steps=4.99)
    losses.end_trial()
    assert losses.leave_room(2.0, paid_steps=5.01) and not losses.leave_room(2.0, paid_steps=4.99)


def test_what_a_trial_gains_pays_for_its_other_steps_and_for_trials_before_it_but_not_in_advance() -> None:
    losses = TrialLosses()
    for took_steps, worth_steps in ((1.25, 0.0), (1.0, 3.0)):  # guesses that come true are paid for a step before
        losses.note(took_steps, worth_steps)
    losses.end_trial()
    losses.note(3.0, worth_steps=1.0)
    assert losses.leave_room(0.0, paid_steps=2.01) and not losses.leave_room(0.0, paid_steps=1.99)


def test_a_pause_of_the_machine_is_no_loss_of_a_trial() -> None:
    losses = TrialLosses()
    losses.note(3000.0, worth_steps=1.0)
    assert losses.leave_room(0.0, paid_steps=8.01)


def test_a_trial_that_is_as_good_as_what_is_usual_has_lost_nothing() -> None:
    """Known costs are what few steps are faster than: on average a step takes longer, of a trial as any other."""
    chance, losses, usual = random.Random(0), TrialLosses(), TrialLosses()
    for _ in range(400):
        losses.note_usual(chance.uniform(1.0, 1.4))
    for _ in range(100):
        for each in (losses, usual):
            each.note(chance.uniform(1.0, 1.4), worth_steps=1.0)
    assert losses.leave_room(0.0, paid_steps=4.0) and not usual.leave_room(0.0, paid_steps=12.0)


def share_true(acceptance: GuessAcceptance, level: int) -> float:
    """Of guesses so far ahead, where all before have come true."""
    tokens = [acceptance.tokens_per_step(depth) for depth in (level, level + 1)]
    before = acceptance.tokens_per_step(level - 1) if level else 0.0
    return (tokens[1] - tokens[0]) / (tokens[0] - before)


def hard_after_the_first(num_requests: int = 1) -> GuessAcceptance:
    """After 2,000 steps of a text of which one token ahead is guessed, and never two."""
    acceptance = GuessAcceptance()
    for step in range(2000):
        acceptance.note([1] * num_requests, 4, step)
    return acceptance


def test_what_is_known_of_a_deep_guess_is_forgotten_while_only_the_first_is_told_of() -> None:
    told_of_first, told_of_nothing = hard_after_the_first(), hard_after_the_first()
    for step in range(2000, 7000):
        told_of_first.note([1], 1, step)
    for acceptance in (told_of_first, told_of_nothing):
        acceptance.note([4], 4, 7000)
    assert share_true(told_of_first, 1) == pytest.approx(share_true(told_of_nothing, 1))
    assert share_true(told_of_first, 1) > 1.5 * (1 / 101)  # of as many as count in the long run


def test_a_position_that_the_first_step_of_a_trial_does_not_reach_is_forgotten_by_the_next() -> None:
    missed, reached = hard_after_the_first(), hard_after_the_first()
    missed.note([0], 4, 7000)
    for acceptance in (missed, reached):
        acceptance.note([4], 4, 7001)
    assert share_true(missed, 1) == pytest.approx(share_true(reached, 1))


@pytest.mark.parametrize("num_requests", [1, 16, 64])
def test_a_trial_leaves_about_a_third_of_what_was_known_of_however_many_requests(num_requests: int) -> None:
    odds = []
    for step in (2000, 1_000_000):
        acceptance = hard_after_the_first(num_requests)
        acceptance.note([4] * num_requests, 4, step)
        odds.append(1 / share_true(acceptance, 1) - 1)
    assert 0.33 < odds[1] / odds[0] < 0.45
