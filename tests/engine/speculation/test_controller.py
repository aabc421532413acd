"""The controller in a world whose costs and acceptance are known."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable
from itertools import pairwise

import pytest

from eagleray.engine.speculation import build
from eagleray.engine.speculation.controller import StepTimes
from eagleray.engine.speculation.tree import DraftShape
from tests.support.guessing_worlds import (
    CHAINS,
    Busy,
    Levels,
    Measured,
    Tied,
    Trees,
    World,
    adaptive,
    compute_bound,
    memory_bound,
    told,
)


@pytest.mark.parametrize("num_requests", [1, 4, 16])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9])
def test_it_is_never_much_slower_than_no_guesses(num_requests: int, acceptance: float) -> None:
    for verify_s in (memory_bound, compute_bound):
        world = World(num_requests, acceptance, verify_s, draft_token_s=1e-3)
        policy = adaptive(CHAINS)
        for _ in range(3000):
            world.step(policy)
        assert world.num_tokens / world.spent_s > 0.97 * world.tokens_per_s(None)


def test_what_a_network_costs_while_nothing_is_guessed_does_not_speak_against_guessing() -> None:
    world = World(1, 0.5, memory_bound, draft_token_s=1e-3, upkeep_s=5e-3)
    policy = adaptive([DraftShape(1)])
    chosen = [world.step(policy) for _ in range(500)]
    assert chosen[-100:].count(None) < 20


def test_it_does_not_guess_where_what_steps_take_beside_computing_eats_up_what_guesses_bring() -> None:
    world = World(16, 0.7, memory_bound, draft_token_s=1e-4, outside_s=lambda num_rows: 5e-4 * (num_rows - 16))
    policy = adaptive(CHAINS)
    chosen = [world.step(policy) for _ in range(500)]
    assert chosen[-100:].count(None) > 80
    assert world.tokens_per_s(None) > max(map(world.tokens_per_s, CHAINS))  # or it would be wrong


@pytest.mark.parametrize("num_requests", [4, 16])
@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.75])
def test_it_loses_little_from_the_first_step_on_where_no_guessing_is_best(num_requests: int, acceptance: float) -> None:
    world = World(num_requests, acceptance, compute_bound, draft_token_s=1e-3)
    policy = adaptive(CHAINS)
    for _ in range(400):
        world.step(policy)
    assert world.num_tokens / world.spent_s > 0.96 * world.tokens_per_s(None)


def test_what_one_batch_size_taught_serves_another() -> None:
    world = World(16, 0.6, compute_bound, draft_token_s=1e-3)
    policy = adaptive(CHAINS)
    for _ in range(400):
        world.step(policy)
    world.num_requests = 12
    assert [world.step(policy) for _ in range(30)].count(None) >= 28


@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.95])
def test_it_comes_close_to_the_best_shape(acceptance: float) -> None:
    world = World(4, acceptance, memory_bound, draft_token_s=1e-3)
    policy = adaptive(CHAINS)
    for _ in range(4000):
        world.step(policy)
    best = max(world.tokens_per_s(shape) for shape in CHAINS)
    assert world.num_tokens / world.spent_s > 0.93 * best


def test_it_turns_off_when_rows_cost_time_and_on_again_when_they_do_not() -> None:
    world = World(1, 0.8, memory_bound, draft_token_s=0.5e-3)
    policy = adaptive(CHAINS)

    def share_of_guessing() -> float:
        return sum(world.step(policy) is not None for _ in range(1000)) / 1000

    assert share_of_guessing() > 0.9
    world.verify_s = compute_bound
    for _ in range(5):
        share_of_guessing()
    assert share_of_guessing() < 0.15
    world.verify_s = memory_bound
    share_of_guessing()
    assert share_of_guessing() > 0.9


def test_first_times_that_are_slow_do_not_speak_against_guessing() -> None:
    """Guesses of a new shape are recorded: that takes many times as long as guessing does ever after."""
    world = World(1, 0.8, memory_bound, draft_token_s=0.5e-3)
    world.slowness_of_new_shapes = 50.0
    policy = adaptive(CHAINS)
    for _ in range(300):
        world.step(policy)
    assert [world.step(policy) for _ in range(100)].count(None) < 10


def test_what_first_steps_of_a_kind_take_beyond_others_is_paid_for_as_trials_are() -> None:
    """Guessing brings hardly less than not to, so that trials lose nothing, but each is of a kind of its own."""
    shape, first_s = DraftShape(1), 50e-3
    policy = adaptive([shape])
    times_seen: Counter[Hashable] = Counter()
    first_times_s = all_s = 0.0
    verified: DraftShape | None = None
    for step in range(6000):
        size = 2 + 2 * (step // 20 % 64)
        drafted = policy.choose(size, 100_000)
        num_rows = size * (1 + (verified is not None))
        took_s = [1e-3 * num_rows**0.62, 0.05e-3 if drafted else 0.0]  # twice as many rows: 1.54 times as long
        for index, is_guess, kind in ((0, verified, (size, num_rows)), (1, drafted, (size, drafted))):
            times_seen[kind] += 1
            if is_guess and times_seen[kind] <= 2:
                took_s[index] += first_s
                first_times_s += first_s
        if verified is not None:
            policy.note_acceptance(verified, size, [1, 2] * (size // 2))
        tokens_each = 1.0 if verified is None else 1.5
        policy.note_times(StepTimes(size, num_rows, *took_s, drafted, verified, tokens_each=tokens_each))
        verified, all_s = drafted, all_s + sum(took_s)
    assert first_times_s < 0.04 * all_s  # 0.05 if nobody counted them


def test_nothing_is_guessed_for_nobody() -> None:
    assert adaptive(CHAINS).choose(0, max_rows=64) is None


def test_a_shape_for_which_a_step_has_no_room_is_not_chosen() -> None:
    world = World(16, 0.95, memory_bound, draft_token_s=0.1e-3)
    policy = adaptive(CHAINS)
    assert DraftShape(5) in [world.step(policy) for _ in range(300)]
    world.max_rows = 16 * 3  # each request's known token and two guesses
    chosen = [world.step(policy) for _ in range(300)]
    assert DraftShape(2) in chosen and {DraftShape(3), DraftShape(5)}.isdisjoint(chosen)
    world.max_rows = 20
    assert world.step(policy) is None


# ---- how much it loses against who knows


@pytest.mark.parametrize("num_requests", [1, 4, 16])
@pytest.mark.parametrize("scatter", [0.06, 0.15])
def test_it_loses_little_against_who_knows_costs_and_luck(num_requests: int, scatter: float) -> None:
    for seed in range(6):
        world = Measured(num_requests, scatter, seed)
        assert world.run() > 0.95 * max(map(world.tokens_per_s, world.SHAPES))


@pytest.mark.parametrize("num_requests", [1, 4, 16])
@pytest.mark.parametrize("luck", [0.0, 0.3, 0.5])
def test_where_guesses_seldom_come_true_it_loses_hardly_anything_against_no_guesses(
    num_requests: int, luck: float
) -> None:
    for seed in range(6):
        world = Measured(num_requests, 0.06, seed, luck)
        assert world.run() > 0.985 * world.tokens_per_s(None)


@pytest.mark.parametrize("num_requests", [1, 4, 16])
def test_it_seldom_does_what_loses_more_than_a_twentieth(num_requests: int) -> None:
    """Neither by trials nor by what it measured wrongly."""
    times: Counter[DraftShape | None] = Counter()
    for seed in range(6):
        world = Measured(num_requests, 0.06, seed)
        world.run()
        times += world.times_drafted
    best = max(map(world.tokens_per_s, world.SHAPES))
    poor = [shape for shape in world.SHAPES if world.tokens_per_s(shape) < 0.95 * best]
    assert poor and sum(times[shape] for shape in poor) < 0.05 * times.total()


def test_where_guesses_are_seldom_found_it_knows_that_longer_ones_cost_little() -> None:
    """What was found of one length tells how much is found of another: rows that are not there take no time."""
    for seed in range(6):
        world = Measured(4, 0.06, seed, share_found=0.3)
        world.draft_token_s = 0.01e-3
        assert world.run() > 0.95 * max(map(world.tokens_per_s, world.SHAPES))
        assert world.times_drafted.most_common(1)[0][0] == DraftShape(3)


@pytest.mark.parametrize("num_requests", [1, 4])
@pytest.mark.parametrize(("share", "most"), [(0.3, 30), (0.5, 30), (0.6, 10), (0.6, 30)])
def test_other_programs_on_the_cores_do_not_keep_it_from_guessing(num_requests: int, share: float, most: float) -> None:
    times: Counter[DraftShape | None] = Counter()
    for seed in range(8):
        world = Busy(num_requests, share, most, seed)
        assert world.run(1500) > 0.85 * max(map(world.tokens_per_s, world.SHAPES))
        times += world.times_drafted
    assert times[None] < 0.15 * times.total()


def test_programs_that_begin_while_it_guesses_do_not_end_it() -> None:
    times: Counter[DraftShape | None] = Counter()
    for seed in range(8):
        world = Busy(1, 0.0, 30, seed)
        policy = adaptive([shape for shape in world.SHAPES if shape])
        for _ in range(1000):
            world.step(policy)
        world.share = 0.5
        world.times_drafted.clear()
        for _ in range(1500):
            world.step(policy)
        times += world.times_drafted
    assert times[None] < 0.05 * times.total()


@pytest.mark.parametrize("scatter", [0.06, 0.1])
@pytest.mark.parametrize("share_found", [1.0, 0.75])
def test_who_came_too_late_to_be_guessed_for_does_not_make_guesses_look_cheap(
    scatter: float, share_found: float
) -> None:
    """Their rows are missing as those of guesses that were not found are, but their tokens are not counted either."""
    for seed in range(6):
        world = Tied(4, scatter, seed, share_found=share_found, is_told_of_all=False)
        assert world.run() > 0.97 * world.tokens_per_s(None)
        assert world.times_drafted[None] > 0.6 * world.times_drafted.total()


@pytest.mark.parametrize("num_requests", [1, 4, 16])
def test_it_takes_up_a_longer_chain_where_the_text_changes(num_requests: int) -> None:
    """One token ahead is guessed as well as before: that tells nothing of those after it, and only trials do."""
    one, four = DraftShape(1), DraftShape(4)
    for seed in range(3):
        world = Levels(num_requests, (0.8, 0.05, 0.05, 0.05), memory_bound, draft_token_s=2e-3)
        world.random.seed(seed)
        policy = adaptive([one, four])
        for deeper, best, num_steps in ((0.05, one, 10_000), (0.9, four, 3000)):
            world.come_true = (0.8, deeper, deeper, deeper)
            assert world.tokens_per_s(best) == max(map(world.tokens_per_s, (None, one, four)))
            chosen = [world.step(policy) for _ in range(num_steps)]
            assert chosen[-500:].count(best) > 0.9 * 500


# ---- trees

# Chains, and trees of several sizes: what a controller chooses from where a tree is configured.
TREES = build._smaller_shapes(DraftShape(4, branching=3, num_nodes=24))
SMALL, HALF, WHOLE = TREES[2:]


def tree_world(num_requests: int, come_true: tuple[float, ...], row_s: float, seed: int = 0) -> Trees:
    world = Trees(num_requests, come_true, lambda num_rows: 10e-3 + row_s * num_rows, draft_token_s=0.2e-3)
    world.random.seed(seed)
    return world


@pytest.mark.parametrize(
    ("num_requests", "come_true", "row_s", "best"),
    [
        (1, (0.45, 0.35, 0.1), 0.0, WHOLE),
        (1, (0.35, 0.3, 0.25), 0.3e-3, HALF),
        (4, (0.4, 0.4, 0.02), 0.3e-3, SMALL),
        (4, (0.8, 0.02, 0.01), 0.5e-3, DraftShape(4)),
    ],
    ids=["whole", "half", "small", "chain"],
)
def test_it_finds_the_size_of_a_tree_that_is_best(
    num_requests: int, come_true: tuple[float, ...], row_s: float, best: DraftShape
) -> None:
    for seed in range(3):
        world = tree_world(num_requests, come_true, row_s, seed)
        policy = adaptive(TREES)
        chosen = [world.step(policy) for _ in range(1500)]
        rates = {shape: world.tokens_per_s(shape) for shape in (None, *TREES)}
        assert all(rate < 0.95 * rates[best] for shape, rate in rates.items() if shape != best)  # or it is not sought
        assert chosen[-500:].count(best) > 0.85 * 500  # now and then a trial's luck speaks for another
        assert world.num_tokens / world.spent_s > 0.9 * rates[best]


@pytest.mark.parametrize("num_requests", [1, 4, 16])
def test_where_neither_trees_nor_chains_pay_it_loses_little_and_hardly_guesses(num_requests: int) -> None:
    num_none = 0
    for seed in range(8):
        world = tree_world(num_requests, (0.15, 0.05, 0.02), 2e-3, seed)
        policy = adaptive(TREES)
        chosen = [world.step(policy) for _ in range(1500)]
        assert max(map(world.tokens_per_s, TREES)) < 0.99 * world.tokens_per_s(None)  # or it would be wrong
        assert chosen[-500:].count(None) > 0.8 * 500  # a trial's luck may speak for guessing for a while
        num_none += chosen[-500:].count(None)
        assert world.num_tokens / world.spent_s > 0.98 * world.tokens_per_s(None)
    assert num_none > 0.95 * 8 * 500


@pytest.mark.parametrize("num_requests", [4, 16])
def test_it_gives_up_a_tree_where_the_text_changes_and_takes_it_up_again(num_requests: int) -> None:
    """What was learned of another text does not outweigh what trials say."""
    likely, unlikely = (0.4, 0.4, 0.02), (0.1, 0.05, 0.02)
    for seed in range(3):
        world = tree_world(num_requests, likely, 1.2e-3 / num_requests, seed)
        policy = adaptive(TREES)
        for come_true, best, num_steps in ((likely, SMALL, 1500), (unlikely, None, 1500), (likely, SMALL, 8000)):
            world.come_true = come_true
            world.nodes.cache_clear()
            assert world.tokens_per_s(best) == max(map(world.tokens_per_s, (None, *TREES)))
            chosen = [world.step(policy) for _ in range(num_steps)]
            assert chosen[-500:].count(best) > 0.8 * 500


# ---- told step by step


def test_the_shape_that_is_kept_must_promise_as_much_as_a_new_one() -> None:
    """One token ahead has become hardly better than none; two are hardly better than one, yet enough than none."""
    one, two = DraftShape(1), DraftShape(2)
    policy = adaptive([one, two])
    for _ in range(500):
        policy.note_acceptance(two, 2, [1])
        policy.note_acceptance(two, 2, [3])  # half of all guesses
    per_step = {None: 1.0, one: 1.5, two: 2.0}
    for costs, expected in (({None: 1.0, one: 0.8, two: 0.9}, one), ({None: 1.0, one: 0.983, two: 0.976}, two)):
        for verified in (None, one, two) * 30:
            for _ in range(2):  # the first is unlike the one before, and not measured
                told(policy, costs[verified] * per_step[verified], verified, verified)
        chosen = []
        for _ in range(100):
            chosen.append(policy.choose(1, 100))
        assert Counter(chosen).most_common(1)[0][0] == expected


def test_a_step_unlike_the_one_before_is_not_measured() -> None:
    """Other weights and programs are in the caches: a trial that ends with it would make its kind look dear."""
    shape = DraftShape(1)
    policy = adaptive([shape])
    for _ in range(300):
        policy.note_acceptance(shape, 1, [2])
    for verified, seconds in [(None, 1.0)] * 30 + [(shape, 2.1), (shape, 2.1), (None, 1.1)] * 30:
        told(policy, seconds, verified, verified)
    assert [policy.choose(1, 100) for _ in range(40)].count(None) > 30


def test_trials_that_were_cut_off_do_not_count_as_lost() -> None:
    """Else they would become as rare as those of a shape that has been measured to lose."""
    shape, trials = DraftShape(1), []
    policy = adaptive([shape])
    for _ in range(300):
        policy.note_acceptance(shape, 1, [1])
    max_rows = 100
    for step in range(4000):
        chosen = policy.choose(1, max_rows)
        max_rows = 100 if chosen is None else 1  # the next step has no room for its guesses
        if chosen is not None:
            trials.append(step)
        told(policy, 1.0, chosen, None)
    gaps = [later - earlier for earlier, later in pairwise(trials)]
    assert len(gaps) > 20 and max(gaps) == gaps[0]


def test_steps_of_which_hardly_two_are_of_one_kind_are_measured_all_the_same() -> None:
    """Some of many requests find a guess and others do not: as many rows seldom come again. Rows cost more than is
    taken for granted before any have been measured."""
    shape, size, chance = DraftShape(1), 256, random.Random(0)
    policy, verified, num_found = adaptive([shape], has_network=False), None, 0
    chosen: list[DraftShape | None] = []
    for _ in range(600):
        drafted = policy.choose(size, 10_000)
        if verified is not None:
            policy.note_acceptance(verified, num_found, [2] * (num_found // 2) + [1] * (size - num_found // 2))
        num_rows = size + num_found
        policy.note_times(StepTimes(size, num_rows, compute_bound(num_rows), 1e-6, drafted, verified))
        verified, num_found = drafted, chance.randrange(64, 192) if drafted else 0
        chosen.append(drafted)
    once_measured = chosen[40:]
    assert sum(shape is not None for shape in once_measured) < 0.025 * len(once_measured)
