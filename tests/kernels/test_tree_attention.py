"""Runs that are trees of drafts: against torch's SDPA with every mask written out, and against causal runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from eagleray.kernels.kv_ops.reference import write_kv
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.paged_attention import native, reference
from eagleray.kernels.paged_attention.plan import AttentionPlan, plan_attention
from eagleray.kernels.paged_attention.tree import TreeRun, tree_run

Attend = Callable[[torch.Tensor, torch.Tensor, AttentionPlan, float, int | None], torch.Tensor]
BLOCK_SIZE_TOKENS, HEAD_DIM, SCALE = 16, 32, 0.2
TREE_BOUND = 1e-6  # of decision 0022, for values of about 1


def random_parents(num_tokens: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(-1, token) for token in range(num_tokens)]


def ancestors(parents: Sequence[int], token: int) -> list[int]:
    """The path to a token, itself included: the definition, apart from ``tree_run``."""
    return [] if token < 0 else [*ancestors(parents, parents[token]), token]


class Batch:
    """Sequences of (prefix, run), the run a list of parents or a number of causal tokens, in a shuffled pool."""

    def __init__(self, sequences: Sequence[tuple[int, list[int] | int]], num_heads: int, num_kv_heads: int) -> None:
        generator = torch.Generator().manual_seed(len(sequences) + num_heads)
        self.prefixes = [prefix for prefix, _ in sequences]
        self.runs = [run for _, run in sequences]
        self.counts = [run if isinstance(run, int) else len(run) for run in self.runs]
        lengths = [prefix + count for prefix, count in zip(self.prefixes, self.counts, strict=True)]
        blocks = [-(-length // BLOCK_SIZE_TOKENS) for length in lengths]
        ids = torch.randperm(sum(blocks), generator=generator).split(blocks)
        self.tables = [table.tolist() for table in ids]
        key, value = torch.randn(2, sum(lengths), num_kv_heads, HEAD_DIM, generator=generator)
        self.keys, self.values = key.split(lengths), value.split(lengths)
        self.kv_layer = torch.full((sum(blocks), 2, num_kv_heads, BLOCK_SIZE_TOKENS, HEAD_DIM), torch.nan)
        whole = plan_attention(starts_of(lengths), [0] * len(lengths), self.tables, BLOCK_SIZE_TOKENS, "cpu")
        write_kv(self.kv_layer, key, value, whole.slots_T)
        self.query = torch.randn(sum(self.counts), num_heads, HEAD_DIM, generator=generator)

    def plan(self, trees: Sequence[TreeRun | None], first_key: int = 0) -> AttentionPlan:
        return plan_attention(
            starts_of(self.counts), self.prefixes, self.tables, BLOCK_SIZE_TOKENS, "cpu", trees, first_key
        )

    def attend(self, attend: Attend, window: int | None, first_key: int = 0) -> torch.Tensor:
        trees = [None if isinstance(run, int) else tree_run(run) for run in self.runs]
        return attend(self.query, self.kv_layer, self.plan(trees, first_key), SCALE, window)

    def dense(self, window: int | None, first_key: int = 0) -> torch.Tensor:
        outputs = []
        for query, key, value, prefix, run in zip(
            self.query.split(self.counts), self.keys, self.values, self.prefixes, self.runs, strict=True
        ):
            mask = dense_mask(prefix, range(-1, run - 1) if isinstance(run, int) else run, window)
            mask[:, :first_key] = False
            output = scaled_dot_product_attention(
                query.double().transpose(0, 1),
                key.double().transpose(0, 1),
                value.double().transpose(0, 1),
                attn_mask=mask,
                scale=SCALE,
                enable_gqa=True,
            )
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs)


def dense_mask(prefix: int, parents: Sequence[int], window: int | None) -> torch.Tensor:
    """[T, S]: the last ``window`` tokens on the way from the sequence's first to each of the run's."""
    mask = torch.zeros(len(parents), prefix + len(parents), dtype=torch.bool)
    for token in range(len(parents)):
        way = [*range(prefix), *(prefix + node for node in ancestors(parents, token))]
        mask[token, way if window is None else way[-window:]] = True
    return mask


def starts_of(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts) + 1)]


@pytest.fixture(params=["reference", "native", "native, two threads"])
def attend(request: pytest.FixtureRequest, load: Callable[..., NativeLibrary]) -> Attend:
    if request.param == "reference":
        return reference.paged_attention
    library = load(num_threads=1 if request.param == "native" else 2)
    return lambda *arguments: native.paged_attention(library, *arguments)


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (4, 1), (7, 1)])
def test_trees_among_decodes_and_prefills_equal_dense_attention(
    attend: Attend, num_heads: int, num_kv_heads: int, window: int | None
) -> None:
    sequences: list[tuple[int, list[int] | int]] = [(90, 1), (0, 70), (33, 40)]
    for seed, (prefix, count) in enumerate([(0, 1), (0, 64), (5, 7), (60, 64), (64, 33), (130, 16)]):
        sequences.insert(seed, (prefix, random_parents(count, seed)))
    batch = Batch(sequences, num_heads, num_kv_heads)
    torch.testing.assert_close(batch.attend(attend, window).double(), batch.dense(window), rtol=0, atol=3e-6)


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("first_key", [0, 1])
def test_trees_in_bfloat16_equal_the_reference(library: NativeLibrary, window: int | None, first_key: int) -> None:
    """Compared: the same numbers in float32."""
    sequences: list[tuple[int, list[int] | int]] = [(90, 1), (33, 40)]
    sequences += [
        (prefix, random_parents(count, prefix)) for prefix, count in [(1, 64), (60, 64), (130, 16), (700, 50)]
    ]
    batch = Batch(sequences, num_heads=4, num_kv_heads=2)
    plan = batch.plan([None if isinstance(run, int) else tree_run(run) for run in batch.runs], first_key)
    query, kv_layer = batch.query.bfloat16(), batch.kv_layer.bfloat16()
    found = native.paged_attention(library, query, kv_layer, plan, SCALE, window)
    expected = reference.paged_attention(query.float(), kv_layer.float(), plan, SCALE, window)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-2)


def test_a_token_that_sees_no_key_gets_zeros(attend: Attend) -> None:
    batch = Batch([(0, 5), (0, 1)], num_heads=4, num_kv_heads=2)
    found = batch.attend(attend, None, first_key=1)
    assert not found[[0, 5]].any() and found[1:5].all()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("first_key", [1, 17])
def test_keys_before_the_first_that_counts_are_never_seen(attend: Attend, first_key: int, window: int | None) -> None:
    sequences: list[tuple[int, list[int] | int]] = [(90, 1), (17, 70), (33, 40), (17, 1), (60, random_parents(9, 1))]
    batch = Batch(sequences, num_heads=4, num_kv_heads=2)
    batch.kv_layer[[table[0] for table in batch.tables], :, :, 0] = 1e3
    found = batch.attend(attend, window, first_key).double()
    torch.testing.assert_close(found, batch.dense(window, first_key), rtol=0, atol=3e-6)


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("prefix", [500, 1290, 1536])
def test_a_tree_over_a_long_context_equals_dense_attention(attend: Attend, prefix: int, window: int | None) -> None:
    batch = Batch([(prefix, random_parents(50, prefix))], 2, 1)  # few tiles: threads share its splits
    torch.testing.assert_close(batch.attend(attend, window).double(), batch.dense(window), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("window", [None, 9, 100])
def test_a_chain_gives_the_bits_of_a_causal_run(
    library: NativeLibrary,
    load: Callable[..., NativeLibrary],
    window: int | None,
    num_threads: int,
    dtype: torch.dtype,
) -> None:
    chain, library = tree_run(range(-1, 63)), load(library.level, num_threads)
    for prefixes in ([0, 1, 63, 64, 500, 1000], [1000]):
        batch = Batch([(prefix, 64) for prefix in prefixes], 4, 2)
        query, kv_layer = batch.query.to(dtype), batch.kv_layer.to(dtype)
        causal, trees = (
            native.paged_attention(library, query, kv_layer, plan, SCALE, window)
            for plan in (batch.plan([None] * len(prefixes)), batch.plan([chain] * len(prefixes)))
        )
        assert torch.equal(causal, trees)


def test_a_guess_gets_what_its_path_alone_gets_in_a_chain_bit_for_bit_and_in_a_tree_up_to_the_last_bits(
    load: Callable[..., NativeLibrary],
) -> None:
    library, largest = load(num_threads=1), 0.0
    for prefix in (5, 60, 250, 500, 1290):
        assert torch.equal(*as_guess_and_alone(library, prefix, list(range(-1, 15))))
        in_tree, alone = as_guess_and_alone(library, prefix, random_parents(16, prefix))
        largest = max(largest, (in_tree - alone).abs().max().item())
    assert 0.0 < largest < TREE_BOUND  # of nothing at all, decision 0022 would be out of date


def as_guess_and_alone(library: NativeLibrary, prefix: int, parents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token gets as a guess of the tree, and decoded after its ancestors in the slots of their positions."""
    batch = Batch([(prefix, parents)], 4, 2)
    [keys], [values] = batch.keys, batch.values
    alone = []
    for token in range(len(parents)):
        path = [*range(prefix), *(prefix + node for node in ancestors(parents, token))]
        table, pool = [list(range(-(-len(path) // BLOCK_SIZE_TOKENS)))], torch.full_like(batch.kv_layer, torch.nan)
        whole = plan_attention([0, len(path)], [0], table, BLOCK_SIZE_TOKENS, "cpu")
        write_kv(pool, keys[path], values[path], whole.slots_T)
        plan = plan_attention([0, 1], [len(path) - 1], table, BLOCK_SIZE_TOKENS, "cpu")
        alone.append(native.paged_attention(library, batch.query[token : token + 1], pool, plan, SCALE, None))
    return batch.attend(lambda *arguments: native.paged_attention(library, *arguments), None), torch.cat(alone)


def test_a_tree_of_parents_is_each_tokens_path() -> None:
    for seed in range(5):
        parents = random_parents(64, seed)
        tree = tree_run(parents)
        for token in range(64):
            path = ancestors(parents, token)
            assert tree.masks[token] == sum(1 << node for node in path)
            assert tree.depths[token] == len(path) - 1


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "a tree of 0 tokens"),
        ([-1] * 65, "a tree of 65 tokens"),
        ([-1, 1], r"parents\[1\] is 1"),
        ([-2], r"parents\[0\] is -2"),
    ],
)
def test_parents_that_form_no_tree_are_refused(parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_run(parents)


def test_a_tree_of_another_size_than_its_run_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 2 query tokens, its tree has 3"):
        plan_attention([0, 1, 3], [0, 0], [[0], [1]], 16, "cpu", [None, tree_run([-1, 0, 0])])


def test_a_batch_without_trees_carries_no_masks() -> None:
    plan = plan_attention([0, 2], [0], [[0]], 16, "cpu")
    assert plan.tables.tree_masks is None
    assert plan.tables.tree_depths is None
