"""A fake executor: no model and no torch, but real bytes in real blocks, checked.

The KV of a token is 8 bytes: a hash of the model and of the request's tokens up to and including it. A run attends
over its whole prefix, so each step compares the bytes in the request's blocks with what its tokens call for. A block
that was freed too early, shared wrongly, swapped or transferred wrongly, or never written, ends the step with an
``AssertionError``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.messages import TokenLogprobs
from eagleray.core.request import RequestSpec
from eagleray.engine.execution.kv_memory import KVMemory
from eagleray.engine.scheduling.plan import BlockCopy, SampledToken, ScheduledRun, StepPlan, StepResult
from eagleray.engine.speculation.tree import ROOT, DraftShape, DraftTree
from eagleray.engine.speculation.verify import accepted_nodes

SLOT_BYTES: Final = 8
_MASK: Final = 2**64 - 1
_STRIDE: Final = 0x9E3779B97F4A7C15
_FIRST_FACTOR: Final = 0xBF58476D1CE4E5B9
_SECOND_FACTOR: Final = 0x94D049BB133111EB


def fake_layout(block_size_tokens: int) -> KVLayout:
    """A layout whose blocks have ``SLOT_BYTES`` per token: key and value of one head of one float32."""
    return KVLayout(block_size_tokens, (LayerGroup("fake", num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32"),))


class FakeExecutor:
    """Implements ``Executor``: computes a step as late as possible, when somebody waits for it. So whatever is done in
    the meantime to blocks that the step uses shows.

    Args:
        eos_rate: probability that a token is the request's first end-of-sequence token; otherwise none is sampled.
        shared: the pool lies in shared memory, so that a transport that needs it can be tested.
        model_identity: executors with different ones compute different KV and tokens.
        guess_rate: probability that a guess is what its path would sample next.
    """

    computes_with = "nothing: the executor is a fake"
    draft_identity = ""
    has_draft_network = True  # it overwrites the slots that such a network would

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        num_host_blocks: int = 0,
        block_size_tokens: int = 16,
        vocab_size: int = 256,
        eos_rate: float = 0.0,
        max_model_tokens: int = 4096,
        model_identity: str = "fake",
        shared: bool = False,
        guess_rate: float = 0.7,
    ) -> None:
        self.layout = fake_layout(block_size_tokens)
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.vocab_size = vocab_size
        self.max_model_tokens = max_model_tokens
        self.model_identity = model_identity
        self.kv = KVMemory(self.layout, num_blocks, shared)
        self._host_kv = KVMemory(self.layout, num_host_blocks)
        self._eos_rate = eos_rate
        self._guess_rate = guess_rate
        self._model_key = xxhash.xxh3_64_intdigest(model_identity.encode())

    def submit(self, plan: StepPlan) -> FakeStep:
        return FakeStep(partial(self._run, plan))

    def close(self) -> None:
        """Offer the pool to no new reader."""
        self.kv.close()

    def next_token(self, spec: RequestSpec, known_token_ids: Sequence[int]) -> int:
        """What the request samples after ``known_token_ids``: a pure function of them, its seed and its choice."""
        bits = int(prefix_hashes(known_token_ids, self._model_key)[-1])
        bits = _mix(_mix(bits ^ (spec.sampling.seed or 0)) + spec.choice)
        num_output_tokens = len(known_token_ids) - spec.num_prompt_tokens
        may_stop = num_output_tokens >= spec.sampling.min_tokens
        if spec.eos_token_ids and may_stop and _mix(bits + _STRIDE) < self._eos_rate * 2**64:
            return spec.eos_token_ids[0]
        forbidden = {*spec.eos_token_ids, *(() if may_stop else spec.sampling.stop_token_ids)}
        candidates = ((bits + offset) % self.vocab_size for offset in range(self.vocab_size))
        return next(token_id for token_id in candidates if token_id not in forbidden)

    def continuation(self, spec: RequestSpec, num_tokens: int) -> list[int]:
        """The next ``num_tokens`` tokens that the request would sample, whatever serves it; ends are not heeded."""
        known = list(spec.token_ids)
        for _ in range(num_tokens):
            known.append(self.next_token(spec, known))
        return known[len(spec.token_ids) :]

    def _run(self, plan: StepPlan) -> StepResult:
        _check_plan(plan, self.layout.block_size_tokens)
        _copy_blocks(self.kv, self._host_kv, plan.swap_out)
        _copy_blocks(self._host_kv, self.kv, plan.swap_in)
        # All are written before any is read, as a layer does: so runs that write into each other's blocks are caught.
        for run in plan.runs:
            self._write(run)
        for run in plan.runs:
            self._attend(run)
        walks = {run.spec.request_id: self._walk(run) for run in plan.runs if run.samples}
        return StepResult(
            sampled={request_id: walk.sampled for request_id, walk in walks.items()},
            prompt_logprobs={
                run.spec.request_id: _prompt_logprobs(run, run.spec.sampling.prompt_logprobs, self.vocab_size)
                for run in plan.runs
                if run.spec.sampling.prompt_logprobs is not None and run.start < run.spec.num_prompt_tokens - 1
            },
            drafts={
                run.spec.request_id: self._guess(run, walks[run.spec.request_id], plan.shape)
                for run in plan.runs
                if run.may_draft and plan.shape is not None
            },
        )

    def _write(self, run: ScheduledRun) -> None:
        known = run.known_token_ids[: run.end]
        for position, value in enumerate(self._hashes(known)[run.start :], run.start):
            self._store(run, position, value)
        for node in range(len(run.draft) if run.draft is not None else 0):
            self._store(run, run.end + node, self._hashes([*known, *_path_token_ids(run, node)])[-1])

    def _hashes(self, token_ids: Sequence[int]) -> npt.NDArray[np.uint64]:
        return prefix_hashes(token_ids, self._model_key)

    def _store(self, run: ScheduledRun, position: int, value: np.uint64) -> None:
        size = self.layout.block_size_tokens
        _slots(self.kv, run.block_ids[position // size])[position % size] = value

    def _load(self, run: ScheduledRun, position: int) -> np.uint64:
        size = self.layout.block_size_tokens
        value: np.uint64 = _slots(self.kv, run.block_ids[position // size])[position % size]
        return value

    def _attend(self, run: ScheduledRun) -> None:
        size = self.layout.block_size_tokens
        expected = self._hashes(run.known_token_ids[: run.end])
        block_ids = run.block_ids[: -(-run.end // size)]
        found = np.concatenate([_slots(self.kv, block_id) for block_id in block_ids])[: run.end]
        wrong = np.flatnonzero(found != expected)
        if len(wrong):
            position = int(wrong[0])
            origin = "written in this step, and overwritten" if position >= run.start else "held from before"
            raise AssertionError(
                f"request {run.spec.request_id}: KV at position {position} ({origin}; block "
                f"{run.block_ids[position // size]}, slot {position % size}) is not that of its tokens; "
                f"{len(wrong)} of {run.end} positions are wrong"
            )

    def _walk(self, run: ScheduledRun) -> _Walk:
        """Verify the guesses of a run, and bring the KV of those that came true into the slots of their positions."""
        tree = run.draft or DraftTree((), ())
        known = list(run.known_token_ids[: run.end])
        paths = [known, *([*known, *_path_token_ids(run, node)] for node in range(len(tree)))]
        accepted = accepted_nodes(tree, [self.next_token(run.spec, path) for path in paths])
        for place, node in enumerate(accepted):
            self._store(run, run.end + place, self._load(run, run.end + node))
        token_ids = [tree.token_ids[node] for node in accepted]
        token_ids.append(self.next_token(run.spec, known + token_ids))
        num_top = run.spec.sampling.logprobs
        sampled = tuple(
            SampledToken(token, None if num_top is None else _fake_logprobs(token, num_top, self.vocab_size))
            for token in token_ids
        )
        return _Walk([*known, *token_ids], sampled)

    def _guess(self, run: ScheduledRun, walk: _Walk, shape: DraftShape) -> DraftTree:
        """A tree of ``shape`` whose guesses are right at random; the slots of its expanded nodes are overwritten, as a
        drafting network does."""
        for place in range(1 + shape.num_expanded):
            self._store(run, len(walk.token_ids) - 1 + place, np.uint64(0))
        branching, paths = shape.branching, shape.paths
        if not paths:
            levels = range(1, shape.depth + 1)
            firsts = [(0,) * (depth - 1) + (rank,) for depth in levels for rank in range(branching)]
            paths = tuple(firsts[: shape.max_nodes])
        token_ids: dict[tuple[int, ...], int] = {}
        for path in paths:
            known = walk.token_ids + [token_ids[path[: depth + 1]] for depth in range(len(path) - 1)]
            right = self.next_token(run.spec, known)
            bits = int(self._hashes([*known, path[-1]])[-1])
            is_right = path[-1] == 0 and bits < self._guess_rate * 2**64
            token_ids[path] = right if is_right else (right + 1 + path[-1]) % self.vocab_size
        places = {path: place for place, path in enumerate(token_ids)}
        return DraftTree(tuple(token_ids.values()), tuple(places.get(path[:-1], ROOT) for path in places))


@dataclass(frozen=True, slots=True)
class _Walk:
    """A run that was verified."""

    token_ids: list[int]  # all that are known now
    sampled: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class FakeStep:
    """A step that will be computed."""

    compute: Callable[[], StepResult]

    def result(self) -> StepResult:
        return self.compute()


def prefix_hashes(token_ids: Sequence[int], model_key: int) -> npt.NDArray[np.uint64]:
    """For each position, a hash of all tokens up to and including it: a running sum of mixed (position, token) pairs,
    mixed with the model."""
    tokens = np.asarray(token_ids, dtype=np.int64).astype(np.uint64)
    positions = np.arange(1, len(tokens) + 1, dtype=np.uint64) * np.uint64(_STRIDE)
    terms: npt.NDArray[np.uint64] = _mix_array(_mix_array(positions) ^ tokens)
    return _mix_array(np.cumsum(terms, dtype=np.uint64) ^ np.uint64(model_key))


def _check_plan(plan: StepPlan, block_size_tokens: int) -> None:
    request_ids = [run.spec.request_id for run in plan.runs]
    assert len(set(request_ids)) == len(request_ids), f"a request has two runs in one step: {request_ids}"
    for run in plan.runs:
        known, end = len(run.known_token_ids), run.start + run.num_rows
        assert run.num_tokens > 0, f"request {run.spec.request_id}: a run of {run.num_tokens} tokens"
        assert run.start >= 0 and run.end <= known, f"request {run.spec.request_id}: run beyond its {known} tokens"
        assert run.samples == (run.end == known), f"request {run.spec.request_id}: samples={run.samples} at {run.end}"
        held = len(run.block_ids) * block_size_tokens
        assert end <= held, f"request {run.spec.request_id}: run ends at {end}, its blocks at {held}"
        assert run.samples or not (run.draft or run.may_draft), f"request {run.spec.request_id}: it guesses"
        assert len(set(run.block_ids)) == len(run.block_ids), (
            f"request {run.spec.request_id}: a block twice in its table"
        )


def _path_token_ids(run: ScheduledRun, node: int) -> list[int]:
    assert run.draft is not None
    return [run.draft.token_ids[step] for step in run.draft.path(node)]


def _copy_blocks(source: KVMemory, target: KVMemory, copies: Sequence[BlockCopy]) -> None:
    for copy in copies:
        for read, write in zip(source.block_views(copy.source), target.block_views(copy.target), strict=True):
            write[:] = read


def _slots(kv: KVMemory, block_id: int) -> npt.NDArray[np.uint64]:
    """The slots of one block, writable."""
    return np.frombuffer(kv.block_views(block_id)[0], dtype=np.dtype("<u8"))


def _prompt_logprobs(run: ScheduledRun, num_top: int, vocab_size: int) -> list[TokenLogprobs]:
    end = min(run.end, run.spec.num_prompt_tokens - 1)
    next_token_ids = run.known_token_ids[run.start + 1 : end + 1]
    return [_fake_logprobs(token_id, num_top, vocab_size) for token_id in next_token_ids]


def _fake_logprobs(token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """The token itself is the best; each alternative is one less probable."""
    top_ids = tuple((token_id + rank) % vocab_size for rank in range(num_top))
    return TokenLogprobs(token_id, -1.0, 1, top_ids, tuple(-1.0 - rank for rank in range(num_top)))


def _mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _FIRST_FACTOR & _MASK
    value = (value ^ (value >> 27)) * _SECOND_FACTOR & _MASK
    return value ^ (value >> 31)


def _mix_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST_FACTOR)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND_FACTOR)
    return values ^ (values >> np.uint64(31))
