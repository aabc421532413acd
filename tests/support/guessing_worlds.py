"""Worlds in which a controller guesses: what steps take and what comes true is known."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from itertools import product
from typing import ClassVar

import msgspec

from eagleray.engine.speculation.controller import AdaptiveDrafts, StepTimes
from eagleray.engine.speculation.tree import DraftShape

CHAINS = [DraftShape(depth) for depth in (1, 2, 3, 5)]


class Engine:
    """Asks and tells in the order in which an engine does: of a step while the next one, already chosen, computes."""

    def __init__(self, policy: AdaptiveDrafts) -> None:
        self.policy = policy
        self.untold: list[Callable[[], None]] = []
        self.num_untold = 0
        self.verified: DraftShape | None = None

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        shape = self.policy.choose(num_decoding, max_rows)
        for tell in self.untold:
            tell()
        self.untold.clear()
        return shape

    def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
        self.untold.append(partial(self.policy.note_acceptance, shape, num_guesses, num_tokens))

    def note_times(self, times: StepTimes) -> None:
        times = msgspec.structs.replace(times, is_like_the_last=times.verified == self.verified)
        self.verified = times.verified
        self.untold.append(partial(self._tell_times, times))

    def _tell_times(self, times: StepTimes) -> None:
        if self.num_untold > 0 and not (times.drafted or times.verified):
            self.num_untold -= 1
        else:
            self.num_untold = self.policy.note_times(times)


def adaptive(shapes: Sequence[DraftShape], has_network: bool = True) -> Engine:
    return Engine(AdaptiveDrafts(shapes, has_network))


class World:
    """Steps of ``num_requests`` requests whose guesses come true with ``acceptance`` each."""

    def __init__(
        self,
        num_requests: int,
        acceptance: float,
        verify_s: Callable[[int], float],
        draft_token_s: float,
        upkeep_s: float = 0.0,
        outside_s: Callable[[int], float] = lambda num_rows: 0.0,
    ) -> None:
        self.outside_s = outside_s
        self.num_requests, self.acceptance, self.upkeep_s = num_requests, acceptance, upkeep_s
        self.verify_s, self.draft_token_s = verify_s, draft_token_s
        self.random = random.Random(0)
        self.slowness_of_new_shapes = 1.0
        self.max_rows = 100_000
        self.times_drafted: Counter[DraftShape | None] = Counter()
        self.pending: DraftShape | None = None
        self.spent_s = 0.0
        self.num_tokens = 0

    def step(self, policy: Engine) -> DraftShape | None:
        shape, verified = policy.choose(self.num_requests, self.max_rows), self.pending
        num_rows = self.num_requests * (1 + (verified.max_nodes if verified else 0))
        gained = [self._gain(verified) for _ in range(self.num_requests)]
        noise = self.random.uniform(0.95, 1.05)
        verify_s = self.verify_s(num_rows) * noise
        draft_s = (self.upkeep_s + self.draft_s(shape)) * noise
        self.times_drafted[shape] += 1
        if self.times_drafted[shape] <= 2:
            draft_s *= self.slowness_of_new_shapes
        if verified is not None:
            policy.note_acceptance(verified, num_rows - self.num_requests, gained)
        caught_up = self.num_requests if self.upkeep_s and shape is None else 0
        outside_s = self.outside_s(num_rows)
        times = (verify_s, draft_s)
        told_times = StepTimes(self.num_requests, num_rows, *times, shape, verified, caught_up, outside_s)
        policy.note_times(msgspec.structs.replace(told_times, tokens_each=sum(gained) / len(gained)))
        self.pending = shape
        self.spent_s += verify_s + draft_s + outside_s
        self.num_tokens += sum(gained)
        return shape

    def _gain(self, shape: DraftShape | None) -> int:
        gained = 1
        while shape is not None and gained <= shape.depth and self.random.random() < self.acceptance:
            gained += 1
        return gained

    def draft_s(self, shape: DraftShape | None) -> float:
        return self.draft_token_s * (shape.depth if shape else 0)

    def tokens_per_step(self, shape: DraftShape | None) -> float:
        """Of one request."""
        return sum(self.acceptance**level for level in range(1 + (shape.depth if shape else 0)))

    def tokens_per_s(self, shape: DraftShape | None) -> float:
        """What always guessing ``shape`` would bring in the long run."""
        num_rows = self.num_requests * (1 + (shape.max_nodes if shape else 0))
        step_s = self.verify_s(num_rows) + self.outside_s(num_rows) + self.upkeep_s + self.draft_s(shape)
        return self.num_requests * self.tokens_per_step(shape) / step_s


def memory_bound(num_rows: int) -> float:
    return 10e-3


def compute_bound(num_rows: int) -> float:
    return 1e-3 * num_rows


class Trees(World):
    """What comes next is the best guess, the second best or another, each with a probability of its own. Of all paths
    of guesses the likeliest are verified, and to guess a level of a tree takes longer than a token of a chain."""

    LEVEL_OF_TREE: ClassVar = 1.5  # tokens of a chain

    def __init__(
        self, num_requests: int, come_true: Sequence[float], verify_s: Callable[[int], float], draft_token_s: float
    ) -> None:
        super().__init__(num_requests, 0.0, verify_s, draft_token_s)
        self.come_true = come_true  # by rank
        self.nodes = cache(self._likeliest)

    def _likeliest(self, shape: DraftShape) -> dict[tuple[int, ...], float]:
        """Paths of ranks that are verified: how likely all of each comes true."""
        paths = [path for depth in range(1, shape.depth + 1) for path in product(range(shape.branching), repeat=depth)]
        likely = {path: math.prod(self.come_true[rank] for rank in path) for path in paths}
        return dict(sorted(likely.items(), key=lambda item: -item[1])[: shape.max_nodes])

    def draft_s(self, shape: DraftShape | None) -> float:
        return super().draft_s(shape) * (1.0 if shape is None or shape.is_chain else self.LEVEL_OF_TREE)

    def _gain(self, shape: DraftShape | None) -> int:
        nodes, path = self.nodes(shape) if shape else {}, ()
        while (path := (*path, self._next_rank())) in nodes:
            pass
        return len(path)

    def _next_rank(self) -> int:
        chance, *_ = self.random.choices(range(len(self.come_true) + 1), (*self.come_true, 1.0 - sum(self.come_true)))
        return chance

    def tokens_per_step(self, shape: DraftShape | None) -> float:
        return 1.0 + (sum(self.nodes(shape).values()) if shape else 0.0)


class Levels(World):
    """How likely a guess comes true depends on how far ahead it is."""

    def __init__(
        self, num_requests: int, come_true: Sequence[float], verify_s: Callable[[int], float], draft_token_s: float
    ) -> None:
        super().__init__(num_requests, 0.0, verify_s, draft_token_s)
        self.come_true = come_true  # by how far ahead, if all before has

    def _gain(self, shape: DraftShape | None) -> int:
        gained = 1
        while shape and gained <= shape.depth and self.random.random() < self.come_true[gained - 1]:
            gained += 1
        return gained

    def tokens_per_step(self, shape: DraftShape | None) -> float:
        return sum(math.prod(self.come_true[:level]) for level in range(1 + (shape.depth if shape else 0)))


class Measured(World):
    """The demo model with its head in float32 on one core of a Xeon: chains of up to three tokens, of which 76 %, 59 %
    and 52 % come true. Times scatter, some steps are disturbed, and the first two of each kind are recorded."""

    DECODE_S: ClassVar = {
        1: {1: 1.33e-3, 2: 1.45e-3, 3: 1.58e-3, 4: 1.71e-3},
        4: {4: 1.78e-3, 8: 2.45e-3, 12: 3.15e-3, 16: 3.84e-3},
        16: {16: 5.3e-3, 32: 7.4e-3, 48: 9.5e-3, 64: 11.45e-3},
    }
    DRAFT_TOKEN_S: ClassVar = {1: 0.26e-3, 4: 0.36e-3, 16: 0.74e-3}
    COME_TRUE = (0.76, 0.78, 0.87)  # if all before has
    SHAPES = (None, *map(DraftShape, (1, 2, 3)))

    def __init__(
        self,
        num_requests: int,
        scatter: float,
        seed: int,
        luck: float = 1.0,
        share_found: float = 1.0,
        is_told_of_all: bool = True,
    ) -> None:
        super().__init__(num_requests, 0.0, self._between, self.DRAFT_TOKEN_S[num_requests])
        self.random, self.scatter, self.luck, self.share_found = random.Random(seed), scatter, luck, share_found
        self.is_told_of_all = is_told_of_all  # also of requests for which there are no guesses
        self.found = [False] * num_requests  # requests for which there are guesses
        self.num_seen: Counter[Hashable] = Counter()

    def _between(self, num_rows: int) -> float:
        """On a straight line through what was measured with and without guesses."""
        times_s = self.DECODE_S[self.num_requests]
        first, last = times_s[self.num_requests], times_s[4 * self.num_requests]
        return times_s.get(num_rows, first + (last - first) * (num_rows / self.num_requests - 1) / 3)

    def step(self, policy: Engine) -> DraftShape | None:
        shape, verified = policy.choose(self.num_requests, self.max_rows), self.pending
        num_rows = self.num_requests + sum(self.found) * (verified.depth if verified else 0)
        verify_s, draft_s = self.verify_s(num_rows), self.draft_token_s * (shape.depth if shape else 0)
        gained = [self._gain(verified if is_found else None) for is_found in self.found]
        told = [count for count, found in zip(gained, self.found, strict=True) if found or self.is_told_of_all]
        if verified is not None and told:
            policy.note_acceptance(verified, num_rows - self.num_requests, told)
        times = (self._measured(num_rows, verify_s), self._measured(shape, draft_s))
        tokens_each = sum(gained) / len(gained)
        policy.note_times(StepTimes(self.num_requests, num_rows, *times, shape, verified, tokens_each=tokens_each))
        self.pending, self.found = shape, [self.random.random() < self.share_found for _ in self.found]
        self.times_drafted[shape] += 1
        self.spent_s += verify_s + draft_s
        self.num_tokens += sum(gained)
        return shape

    def _measured(self, kind: Hashable, seconds: float) -> float:
        self.num_seen[kind] += 1
        is_disturbed = self.random.random() < self.scatter / 3
        seconds *= math.exp(self.random.gauss(0, self.scatter)) * (self.random.uniform(1, 5) if is_disturbed else 1)
        return seconds * (20 if self.num_seen[kind] <= 2 else 1)

    def _gain(self, shape: DraftShape | None) -> int:
        gained = 1
        while shape and gained <= shape.depth and self.random.random() < self.luck * self.COME_TRUE[gained - 1]:
            gained += 1
        return gained

    def tokens_per_s(self, shape: DraftShape | None) -> float:
        depth, found = shape.depth if shape else 0, self.share_found
        gained = sum(math.prod(self.luck * rate for rate in self.COME_TRUE[:level]) for level in range(1, depth + 1))
        step_s = self.verify_s(round(self.num_requests * (1 + found * depth))) + self.draft_token_s * depth
        return self.num_requests * (1 + found * gained) / step_s

    def run(self, num_steps: int = 3000) -> float:
        """Tokens per second."""
        policy = adaptive([shape for shape in self.SHAPES if shape])
        for _ in range(num_steps):
            self.step(policy)
        return self.num_tokens / self.spent_s


class Busy(Measured):
    """Other programs on the cores: a share of the steps takes many times as long."""

    def __init__(self, num_requests: int, share: float, most: float, seed: int) -> None:
        super().__init__(num_requests, 0.0, seed)
        self.share, self.most = share, most

    def _measured(self, kind: Hashable, seconds: float) -> float:
        is_disturbed = self.random.random() < self.share
        return super()._measured(kind, seconds) * (self.random.uniform(1, self.most) if is_disturbed else 1)


class Tied(Measured):
    """The same model on two cores of an EPYC with AVX-512, where guesses for four requests never pay: rows cost nearly
    as much as steps."""

    DECODE_S: ClassVar = {4: {4: 1.52e-3, 8: 2.57e-3, 12: 3.63e-3, 16: 4.68e-3}}
    DRAFT_TOKEN_S: ClassVar = {4: 0.24e-3}
    COME_TRUE = (0.80, 0.825, 0.88)


def told(policy: Engine, seconds: float, drafted: DraftShape | None, verified: DraftShape | None) -> None:
    num_rows = 1 + (verified.max_nodes if verified else 0)
    policy.note_times(StepTimes(1, num_rows, seconds, 1e-6, drafted, verified))
