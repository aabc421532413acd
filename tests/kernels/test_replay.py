"""Replayed steps: the same bits as when they are computed anew."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eagleray.kernels.embedding.native import gather_rows
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.norm_rope.native import rms_norm, rotate_and_store
from eagleray.kernels.paged_attention.native import paged_attention
from eagleray.kernels.paged_attention.plan import AttentionPlan, plan_attention
from eagleray.kernels.replay.api import StepInputs, StepIntegers
from eagleray.kernels.replay.arena import Lifetime, place
from eagleray.kernels.replay.native import NativeReplayer

BLOCK_SIZE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 4, 16, 4, 2
SIZE = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM


class CountedSteps:
    """A layer without weights, run through a replayer beside a twin that computes anew, each on a pool of its own."""

    def __init__(self, library: NativeLibrary, num_blocks: int = 32, clones: bool = False) -> None:
        self.library = library
        self.replayer = NativeReplayer(library)
        shape = (num_blocks, 1, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.pool, self.twin_pool = torch.zeros(shape), torch.zeros(shape)
        self.weight, self.last_weight = torch.rand(SIZE), torch.rand(NUM_HEADS * HEAD_DIM)
        self.num_computed = 0
        self._clones = clones  # a computation by torch between those of the library

    def run(self, hidden: Tensor, plan: AttentionPlan) -> tuple[Tensor, ...]:
        """Replayed, after having been compared with the twin."""

        def compute() -> tuple[Tensor, ...]:
            self.num_computed += 1
            return self.compute(hidden, angles, plan, self.pool)

        angles = torch.randn(2, len(hidden), HEAD_DIM)
        tensors = plan.tensors
        inputs = StepInputs((hidden, angles[0], angles[1], *tensors.fixed), tensors.ragged)
        replayed = self.replayer.run(compute, inputs, plan.first_key)
        for got, wanted in zip(replayed, self.compute(hidden, angles, plan, self.twin_pool), strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(self.pool, self.twin_pool)
        return replayed

    def compute(self, hidden: Tensor, angles: Tensor, plan: AttentionPlan, pool: Tensor) -> tuple[Tensor, ...]:
        normed = rms_norm(self.library, hidden, self.weight, 1e-6)
        heads = (normed.clone() if self._clones else normed).view(len(hidden), -1, HEAD_DIM)
        kv_layer = pool.unbind(1)[0]
        query = rotate_and_store(self.library, heads, *angles, kv_layer, plan.slots_T, None)
        attended = paged_attention(self.library, query, kv_layer, plan, 0.25, None)
        return rms_norm(self.library, attended.view(len(hidden), -1), self.last_weight, 1e-6), hidden


class Sequences(NamedTuple):
    prefixes: list[int]
    counts: list[int]


def plan_of(sequences: Sequences, seed: int, first_key: int = 0) -> AttentionPlan:
    generator = random.Random(seed)
    ids = generator.sample(range(32), 32)
    tables = []
    for prefix, count in zip(*sequences, strict=True):
        num_blocks = -(-(prefix + count) // BLOCK_SIZE)
        tables.append(ids[:num_blocks])
        ids = ids[num_blocks:]
    starts = [sum(sequences.counts[:index]) for index in range(len(sequences.counts) + 1)]
    return plan_attention(starts, sequences.prefixes, tables, BLOCK_SIZE, "cpu", first_key=first_key)


def hidden_of(sequences: Sequences, seed: int) -> Tensor:
    return torch.randn(sum(sequences.counts), SIZE, generator=torch.Generator().manual_seed(seed))


def test_a_replayed_step_has_the_bits_of_one_computed_anew_whatever_positions_blocks_and_lengths_are(
    library: NativeLibrary,
) -> None:
    steps = CountedSteps(library)
    for seed in range(8):
        sequences = Sequences([seed, 9 + 2 * seed, 1], [1, 1, 2])
        steps.run(hidden_of(sequences, seed), plan_of(sequences, seed))
    assert steps.num_computed == 2  # seen, then recorded


def test_steps_of_other_shapes_are_told_apart(library: NativeLibrary) -> None:
    steps = CountedSteps(library)
    shapes = [Sequences([3, 4], [1, 2]), Sequences([3, 4], [2, 1]), Sequences([5], [3]), Sequences([5], [2])]
    for seed in range(4):
        for sequences in shapes:
            for first_key in (0, 1):
                steps.run(hidden_of(sequences, seed), plan_of(sequences, seed, first_key))
    assert steps.num_computed == 2 * 2 * len({(len(shape.counts), sum(shape.counts)) for shape in shapes})


def test_results_stay_when_later_steps_run(load: Callable[..., NativeLibrary]) -> None:
    steps = CountedSteps(load())
    sequences = Sequences([3, 9], [1, 1])
    results = [steps.run(hidden_of(sequences, seed), plan_of(sequences, seed)) for seed in range(4)]
    kept = [result[0].clone() for result in results]
    steps.run(hidden_of(sequences, 9), plan_of(sequences, 9))
    assert all(torch.equal(result[0], copy) for result, copy in zip(results, kept, strict=True))


def test_results_that_nobody_keeps_are_right_until_the_next_step(load: Callable[..., NativeLibrary]) -> None:
    """Of several programs that share their memory, also when a larger one comes, and where one is no whole tensor."""
    library = load()
    replayer, weight = NativeReplayer(library), torch.rand(SIZE)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        def compute() -> tuple[Tensor, ...]:
            normed = rms_norm(library, x, weight, 1e-6)
            return rms_norm(library, normed, weight, 1e-6), normed[1:], x

        results = replayer.run(compute, StepInputs((x,)), None, keep=False)
        assert all(map(torch.equal, results, compute()))
        return results

    sizes = (2, 3, 2, 3, 2, 9, 9, 9, 3, 2)
    results = [run(torch.randn(size, SIZE)) for size in sizes]
    addresses = [result[0].data_ptr() for result in results]
    assert addresses[7] == addresses[8] == addresses[9]  # and no memory is taken anew


def test_vectors_of_integers_are_an_input_whose_last_one_may_have_any_length(
    load: Callable[..., NativeLibrary],
) -> None:
    library, table, num_computed = load(), torch.randn(50, 8), [0]
    replayer = NativeReplayer(library)

    def run(first: list[int], second: list[int]) -> None:
        integers = StepIntegers("cpu", first, second)

        def compute() -> tuple[Tensor, ...]:
            num_computed[0] += 1
            parts = [vector[:1] for vector in integers.tensors]
            return *(gather_rows(library, table, part, torch.float32) for part in parts), integers.tensors[0]

        found = replayer.run(compute, StepInputs(integers=integers), None)
        for got, wanted in zip(found, (table[first[:1]], table[second[:1]], torch.tensor(first)), strict=True):
            assert torch.equal(got, wanted)

    for first, second in (([1, 2], [3]), ([4, 5], [6, 7, 8]), ([9, 10], [11, 12]), ([13, 14], [15])):
        run(first, second)
    assert num_computed == [2]
    run([1, 2, 3], [4])  # another length of the first is another step
    assert num_computed == [3]


def test_a_step_in_which_torch_computes_is_never_replayed(load: Callable[..., NativeLibrary]) -> None:
    steps = CountedSteps(load(), clones=True)
    sequences = Sequences([3, 9], [1, 1])
    for seed in range(5):
        steps.run(hidden_of(sequences, seed), plan_of(sequences, seed))
    assert steps.num_computed == 5


def test_a_step_that_could_not_be_recorded_says_nothing_of_other_shapes(load: Callable[..., NativeLibrary]) -> None:
    steps = CountedSteps(load(), clones=True)
    odd, usual = Sequences([3, 9], [1, 1]), Sequences([3, 9, 2], [1, 1, 1])
    for seed in range(3):
        steps.run(hidden_of(odd, seed), plan_of(odd, seed))
    steps._clones = False
    steps.num_computed = 0
    for seed in range(5):
        steps.run(hidden_of(usual, seed), plan_of(usual, seed))
    assert steps.num_computed == 2


def test_a_step_within_a_recorded_one_becomes_a_part_of_it(load: Callable[..., NativeLibrary]) -> None:
    library, weight, num_computed = load(), torch.rand(8), [0]
    inner, outer = NativeReplayer(library), NativeReplayer(library)

    def twice(x: Tensor) -> tuple[Tensor, ...]:
        num_computed[0] += 1
        (once,) = inner.run(lambda: (rms_norm(library, x, weight, 1e-6),), StepInputs((x,), ()), "inner")
        return (rms_norm(library, once, weight, 1e-6),)

    for _ in range(4):
        x = torch.rand(3, 8)
        (found,) = outer.run(lambda x=x: twice(x), StepInputs((x,), ()), "outer")  # type: ignore[misc]
        assert torch.equal(found, rms_norm(library, rms_norm(library, x, weight, 1e-6), weight, 1e-6))
    assert num_computed == [2]  # the first time, and to be recorded


def test_inputs_that_were_the_same_memory_once_may_be_two_later(library: NativeLibrary) -> None:
    replayer, weight = NativeReplayer(library), torch.rand(SIZE)

    def run(first: Tensor, second: Tensor) -> None:
        def compute() -> tuple[Tensor, ...]:
            return tuple(rms_norm(library, x, weight, 1e-6) for x in (first, second))

        replayed = replayer.run(compute, StepInputs((first, second), ()), None)
        assert all(map(torch.equal, replayed, compute()))

    x, y = torch.randn(2, 3, SIZE)
    for first, second in ((x, x), (x, x), (x, y), (x, y), (y, x)):
        run(first, second)


def test_a_result_that_is_a_part_of_larger_memory_is_found_there(library: NativeLibrary) -> None:
    replayer, weight = NativeReplayer(library), torch.rand(SIZE)
    rows = torch.randn(9, SIZE)
    for begin in (4, 4, 2, 5):
        part = rows[begin : begin + 3]
        results = replayer.run(
            lambda part=part: (rms_norm(library, part, weight, 1e-6), part), StepInputs((part,), ()), None
        )
        assert torch.equal(results[1], part)


def test_a_wrong_block_is_refused_in_a_replayed_step_too(load: Callable[..., NativeLibrary]) -> None:
    steps = CountedSteps(load())
    sequences = Sequences([3, 9], [1, 1])
    for seed in range(3):
        steps.run(hidden_of(sequences, seed), plan_of(sequences, seed))
    plan = plan_of(sequences, 0)
    plan.tables.block_ids[1] = 32
    with pytest.raises(IndexError, match="outside the pool of 32"):
        steps.run(hidden_of(sequences, 0), plan)


def test_more_shapes_than_are_kept_still_compute_right(load: Callable[..., NativeLibrary]) -> None:
    steps = CountedSteps(load(), num_blocks=64)
    for seed in range(3):
        for num_tokens in range(1, 140):
            sequences = Sequences([0], [min(num_tokens, 100)])
            hidden = torch.randn(sum(sequences.counts), SIZE)
            steps.run(hidden, plan_of(sequences, seed))


def test_places_of_results_that_are_needed_at_the_same_time_never_overlap() -> None:
    generator = random.Random(1)
    for _ in range(200):
        lifetimes = []
        for _ in range(generator.randrange(1, 12)):
            first = generator.randrange(20)
            lifetimes.append(Lifetime(generator.randrange(1, 300), first, first + generator.randrange(6)))
        offsets, size = place(lifetimes)
        for (a, at), (b, bt) in combinations(zip(lifetimes, offsets, strict=True), 2):
            alive_together = a.first <= b.last and b.first <= a.last
            assert not alive_together or at + a.num_bytes <= bt or bt + b.num_bytes <= at
        assert all(at % 64 == 0 and at + life.num_bytes <= size for life, at in zip(lifetimes, offsets, strict=True))


def test_results_that_follow_each_other_share_a_place() -> None:
    _, size = place([Lifetime(100, layer, layer + 1) for layer in range(50)])
    assert size <= 2 * 128
