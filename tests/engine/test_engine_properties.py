"""The engine under random arrivals, aborts, preemptions, cache hits, reservations and hand-overs.

The fake executor verifies from the bytes of each block that a step attends over the right prefix, so wrong sharing,
early freeing or a lost swap fails the step; the pool's accounts are checked after every action.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig
from eagleray.core.request import FinishReason, RequestSpec, RequestState
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.engine.speculation.controller import FixedDrafts
from eagleray.engine.speculation.tree import DraftShape, fixed_tree
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

BLOCK_SIZE_TOKENS = 4
TOKENIZER = byte_tokenizer()


SHAPES = [None, DraftShape(3), DraftShape(2, branching=2, num_nodes=4), fixed_tree([(0,), (1,), (0, 0), (0, 1)])]


def new_engine(
    num_blocks: int = 24, num_host_blocks: int = 0, shape: DraftShape | None = None, **settings_: object
) -> tuple[Engine, FakeExecutor]:
    executor = FakeExecutor(
        num_blocks=num_blocks, num_host_blocks=num_host_blocks, block_size_tokens=BLOCK_SIZE_TOKENS, max_model_tokens=64
    )
    config = EngineConfig(**{"max_num_batched_tokens": 16, "max_num_seqs": 6, **settings_})
    clock = ManualClock()
    policy = None if shape is None else FixedDrafts(shape)
    return Engine(executor, config, clock, lambda spec: OutputText(TOKENIZER, spec.sampling, ()), policy), executor


def new_spec(request_id: str, prompt: list[int], max_tokens: int, **rest: object) -> RequestSpec:
    sampling = SamplingParams(max_tokens=max_tokens, seed=7, ignore_eos=True)
    return RequestSpec(
        request_id=request_id, token_ids=tuple(prompt), num_prompt_tokens=len(prompt), sampling=sampling, **rest
    )


# Few distinct tokens and a shared stem: prefixes are hit often.
prompts = st.tuples(st.integers(0, 5), st.lists(st.integers(0, 1), min_size=1, max_size=20)).map(
    lambda parts: [7] * (parts[0] * BLOCK_SIZE_TOKENS) + parts[1]
)


class EngineMachine(RuleBasedStateMachine):
    """Whatever happens, each request that is left alone gets the tokens that it would get alone."""

    @initialize(
        num_blocks=st.integers(16, 40),
        num_host_blocks=st.sampled_from([0, 6, 40]),
        policy=st.sampled_from(["fcfs", "priority", "shortest_prompt_first"]),
        caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.1]),
        shape=st.sampled_from(SHAPES),
    )
    def start(
        self,
        num_blocks: int,
        num_host_blocks: int,
        policy: str,
        caching: bool,
        watermark: float,
        shape: DraftShape | None,
    ) -> None:
        self.engine, self.executor = new_engine(
            num_blocks,
            num_host_blocks,
            shape,
            scheduling_policy=policy,
            enable_prefix_caching=caching,
            watermark=watermark,
        )
        self.ids = (str(number) for number in itertools.count())
        self.specs: dict[str, RequestSpec] = {}
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.reserved: dict[str, list[int]] = {}  # id -> tokens sampled elsewhere
        self.handed_over: set[str] = set()
        self.announced: dict[str, tuple[int, ...]] = {}  # blocks that a reader may be reading
        self.finished: set[str] = set()

    @rule(prompt=prompts, max_tokens=st.integers(1, 12), priority=st.integers(0, 2))
    def add(self, prompt: list[int], max_tokens: int, priority: int) -> None:
        spec = new_spec(next(self.ids), prompt, max_tokens, priority=priority)
        self.specs[spec.request_id] = spec
        self.engine.add(spec)

    @rule(prompt=prompts, emitted=st.integers(0, 4))
    def add_one_that_was_begun_elsewhere(self, prompt: list[int], emitted: int) -> None:
        spec = new_spec(next(self.ids), prompt, 8)
        known = self.executor.continuation(spec, emitted)
        spec = RequestSpec(
            request_id=spec.request_id,
            token_ids=(*spec.token_ids, *known),
            num_prompt_tokens=len(prompt),
            sampling=spec.sampling,
        )
        self.specs[spec.request_id] = spec
        self.tokens[spec.request_id] = list(known)
        self.engine.add(spec)

    @rule(prompt=prompts)
    def add_one_to_hand_over(self, prompt: list[int]) -> None:
        spec = new_spec(next(self.ids), prompt, 5)
        self.specs[spec.request_id] = spec
        self.engine.add(spec, output_limit=1)

    @rule(prompt=prompts)
    def reserve(self, prompt: list[int]) -> None:
        spec = new_spec(next(self.ids), prompt, 6)
        if self.engine.reserve(spec) is not None:
            self.specs[spec.request_id] = spec
            self.reserved[spec.request_id] = self.executor.continuation(spec, 1)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), with_token=st.booleans())
    def commit_a_reservation_whose_transfer_broke_off(self, data: st.DataObject, with_token: bool) -> None:
        """Nothing arrived beyond what was cached (the bytes are not there); maybe the first token did."""
        request_id = data.draw(st.sampled_from(sorted(self.reserved)))
        tokens = self.reserved.pop(request_id) if with_token else self.reserved.pop(request_id)[:0]
        self.tokens[request_id] = list(tokens)
        self.engine.commit(request_id, 0, tuple(tokens), transfer_s=0.0)

    @precondition(lambda self: set(self.specs) - self.finished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(set(self.specs) - self.finished)))
        assert self.engine.end(request_id)
        self._forget(request_id)

    @precondition(lambda self: self.handed_over)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.handed_over)))
        assert self.engine.end(request_id, RequestState.FINISHED)
        self._forget(request_id)

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    @invariant()
    def blocks_that_were_announced_stay_where_they_are(self) -> None:
        for request_id, block_ids in getattr(self, "announced", {}).items():
            assert tuple(self.engine.kv.table(request_id)[: len(block_ids)]) == block_ids

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for request_id in sorted(self.reserved) + sorted(self.handed_over):
            self.engine.end(request_id)
            self._forget(request_id)
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self._step()
            for request_id in sorted(self.handed_over):
                self.release_all(request_id)
        assert not self.engine.has_work, "requests were never finished"
        assert self.engine.kv.pool.num_free == self.engine.kv.pool.num_blocks
        for request_id, spec in self.specs.items():
            alone = new_spec("alone", list(spec.token_ids[: spec.num_prompt_tokens]), spec.sampling.max_tokens or 0)
            assert self.tokens[request_id] == self.executor.continuation(alone, len(self.tokens[request_id]))

    def release_all(self, request_id: str) -> None:
        self.engine.end(request_id, RequestState.FINISHED)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        for holder in (self.specs, self.tokens, self.reserved):
            holder.pop(request_id, None)
        self.announced.pop(request_id, None)
        self.handed_over.discard(request_id)

    def _step(self) -> None:
        outcome = self.engine.step()
        for output in outcome.outputs:
            assert output.position == len(self.tokens[output.request_id])
            self.tokens[output.request_id].extend(output.token_ids)
            if output.finish_reason is not None:
                assert output.finish_reason is FinishReason.LENGTH
                if self.engine.state_of(output.request_id) is None:
                    self.finished.add(output.request_id)
        for progress in outcome.progress:
            self.announced[progress.request_id] = progress.block_ids
            if progress.token_ids:
                self.handed_over.add(progress.request_id)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    chunk=st.sampled_from([1, 3, 16, 64]),
    num_blocks=st.integers(16, 40),
    num_host_blocks=st.sampled_from([0, 40]),
    shape=st.sampled_from(SHAPES),
)
def test_tokens_do_not_depend_on_chunk_size_memory_company_or_guesses(
    lengths: list[int], chunk: int, num_blocks: int, num_host_blocks: int, shape: DraftShape | None
) -> None:
    engine, executor = new_engine(num_blocks, num_host_blocks, shape, max_num_batched_tokens=chunk)
    specs = [new_spec(str(index), [index % 3] * length, 10) for index, length in enumerate(lengths)]
    for spec in specs:
        engine.add(spec)
    tokens: dict[str, list[int]] = defaultdict(list)
    for _ in range(20_000):
        if not engine.has_work:
            break
        for output in engine.step().outputs:
            tokens[output.request_id].extend(output.token_ids)
    engine.check_integrity()
    for spec in specs:
        assert tokens[spec.request_id] == executor.continuation(spec, 10)


def test_a_second_request_with_the_same_prompt_computes_only_what_is_not_in_full_blocks() -> None:
    engine, _ = new_engine()
    for number in range(2):
        engine.add(new_spec(str(number), [1] * 11, 1))
        outcome = engine.step()
        assert outcome.num_computed_tokens == (11 if number == 0 else 3)
        assert outcome.outputs[0].num_cached_tokens == (0 if number == 0 else 8)


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    engine, _ = new_engine()
    engine.add(new_spec("first", [1] * 8, 2))
    engine.step()
    engine.step()
    engine.add(new_spec("second", [1] * 8, 1))
    assert engine.step().num_computed_tokens == 4


def test_tenants_with_different_salts_share_no_blocks() -> None:
    engine, _ = new_engine()
    engine.add(new_spec("first", [1] * 9, 1, tenant_salt="a"))
    engine.step()
    engine.add(new_spec("second", [1] * 9, 1, tenant_salt="b"))
    assert engine.step().num_computed_tokens == 9


def test_preemption_by_swap_brings_the_kv_back_instead_of_computing_it_again() -> None:
    computed = {}
    for num_host_blocks in (0, 64):
        engine, _ = new_engine(16, num_host_blocks, enable_prefix_caching=False, max_num_batched_tokens=64)
        for number in range(3):
            engine.add(new_spec(str(number), [number] * 18, 20))
        total = 0
        while engine.has_work:
            total += engine.step().num_computed_tokens
        assert engine.scheduler.num_preemptions > 0
        computed[num_host_blocks] = total
    assert computed[64] == 3 * (18 + 19) < computed[0]


def test_priority_goes_first_and_the_least_important_gives_way() -> None:
    engine, _ = new_engine(16, scheduling_policy="priority", max_num_seqs=1)
    engine.add(new_spec("later", [1] * 4, 1, priority=5))
    engine.add(new_spec("sooner", [2] * 4, 1, priority=0))
    assert engine.step().outputs[0].request_id == "sooner"


def test_shortest_prompt_goes_first_when_asked_for() -> None:
    engine, _ = new_engine(scheduling_policy="shortest_prompt_first", max_num_seqs=1)
    engine.add(new_spec("long", [1] * 12, 1))
    engine.add(new_spec("short", [2] * 4, 1))
    assert engine.step().outputs[0].request_id == "short"


def test_decoding_requests_are_not_kept_waiting_by_a_long_prompt() -> None:
    engine, _ = new_engine(40, max_num_batched_tokens=8)
    engine.add(new_spec("decoding", [1] * 4, 10))
    engine.step()
    engine.add(new_spec("long", [2] * 60, 1))
    engine.step()  # was under way when the long one came
    for _ in range(5):
        outcome = engine.step()
        assert "decoding" in {output.request_id for output in outcome.outputs}
        assert outcome.num_computed_tokens == 1 + 4  # of the long prompt as much as half of a step


def test_reservations_leave_room_for_those_that_wait_already() -> None:
    engine, _ = new_engine(16)
    engine.add(new_spec("running", [1] * 20, 30))
    engine.step()
    engine.add(new_spec("waiting", [2] * 48, 1))
    engine.step()
    assert engine.state_of("waiting") is RequestState.QUEUED
    assert engine.reserve(new_spec("later", [3] * 8, 4)) is None
    assert engine.end("waiting")
    assert engine.reserve(new_spec("later still", [3] * 8, 4)) is not None


def test_guesses_that_come_true_save_steps() -> None:
    steps = {}
    for shape in (None, DraftShape(3)):
        engine, executor = new_engine(shape=shape)
        engine.add(spec := new_spec("a", [1] * 6, 20))
        steps[shape] = 0
        tokens: list[int] = []
        while engine.has_work:
            steps[shape] += 1
            tokens += [token for output in engine.step().outputs for token in output.token_ids]
        assert tokens == executor.continuation(spec, 20)
    assert steps[DraftShape(3)] < 0.7 * steps[None]


def test_nobody_gives_way_for_guesses() -> None:
    engine, _ = new_engine(16, shape=DraftShape(8), enable_prefix_caching=False, max_num_batched_tokens=64)
    for number in range(3):
        engine.add(new_spec(str(number), [number] * 14, 6))
    while engine.has_work:
        engine.step()
    assert engine.scheduler.num_preemptions == 0


def test_a_block_whose_kv_came_further_than_the_known_tokens_is_computed_again_whole() -> None:
    """A draft keeps one feature for a block, that of its last token: it would be of a token beyond them."""
    for num_prompt_tokens, expected in ((10, 8), (9, 8), (8, 4)):
        engine, _ = new_engine()
        engine.reserve(spec := new_spec("a", [1] * num_prompt_tokens, 4))
        engine.commit("a", len(spec.token_ids), (), transfer_s=0.0)
        request = engine.scheduler.get("a")
        assert request is not None and request.num_computed_tokens == expected


def test_kv_of_all_tokens_but_the_last_is_taken_as_it_came() -> None:
    engine, executor = new_engine()
    engine.reserve(spec := new_spec("a", [1] * 10, 4))
    engine.commit("a", 10, tuple(executor.continuation(spec, 1)), transfer_s=0.0)
    request = engine.scheduler.get("a")
    assert request is not None and request.num_computed_tokens == 10
