from __future__ import annotations

import mmap
import os
from collections import Counter

import pytest

from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.engine.scheduling.plan import BlockCopy, ScheduledRun, StepPlan, StepResult

BLOCK_SIZE = 4


def make_executor(**options: object) -> FakeExecutor:
    return FakeExecutor(**{"num_blocks": 16, "num_host_blocks": 4, "block_size_tokens": BLOCK_SIZE, **options})


def make_spec(
    request_id: str = "a", token_ids: tuple[int, ...] = (5, 6, 7, 8, 9, 10), **sampling: object
) -> RequestSpec:
    return RequestSpec(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(**sampling),
    )


def make_run(
    spec: RequestSpec, block_ids: list[int], start: int = 0, end: int | None = None, known=None
) -> ScheduledRun:
    known = list(spec.token_ids) if known is None else known
    end = len(known) if end is None else end
    return ScheduledRun(spec, known, start, end - start, block_ids, samples=end == len(known))


def run_step(executor: FakeExecutor, *runs: ScheduledRun, **copies: tuple[BlockCopy, ...]) -> StepResult:
    return executor.submit(StepPlan(runs=runs, **copies)).result()


def generate(executor: FakeExecutor, spec: RequestSpec, block_ids: list[int], chunk: int, num_tokens: int) -> list[int]:
    """Prefill in chunks and decode, as a scheduler would."""
    known, computed = list(spec.token_ids), 0
    while len(known) < len(spec.token_ids) + num_tokens:
        end = min(computed + chunk, len(known))
        result = run_step(executor, make_run(spec, block_ids, computed, end, known))
        computed = end
        if spec.request_id in result.sampled:
            known.append(result.sampled[spec.request_id][0].token_id)
    return known[len(spec.token_ids) :]


def test_tokens_do_not_depend_on_chunks_or_blocks():
    spec = make_spec(seed=3)
    expected = make_executor().continuation(spec, 5)
    for chunk in (1, 2, 3, 100):
        assert generate(make_executor(), spec, [7, 2, 11], chunk, 5) == expected


@pytest.mark.parametrize(
    "other",
    [
        make_spec(seed=4),
        make_spec(seed=3, token_ids=(5, 6, 7, 8, 9, 11)),
        make_spec(seed=3, token_ids=(6, 5, 7, 8, 9, 10)),
    ],
    ids=["seed", "token", "order"],
)
def test_seed_tokens_and_their_order_change_the_continuation(other: RequestSpec):
    executor = make_executor()
    assert executor.continuation(make_spec(seed=3), 8) != executor.continuation(other, 8)


def test_choices_of_one_request_differ():
    executor = make_executor()
    first, second = (
        RequestSpec(request_id="a", token_ids=(1,), num_prompt_tokens=1, sampling=SamplingParams(), choice=choice)
        for choice in (0, 1)
    )
    assert executor.continuation(first, 8) != executor.continuation(second, 8)


def test_tokens_cover_the_vocabulary_evenly():
    executor = make_executor(vocab_size=16)
    counts = Counter(executor.next_token(make_spec(seed=seed), [1, 2, 3]) for seed in range(1600))
    assert sorted(counts) == list(range(16))
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 37.7  # chi-square, 15 degrees: p = 0.001


def test_a_block_that_was_never_written_is_caught():
    executor = make_executor()
    with pytest.raises(AssertionError, match=r"request a: KV at position 0 \(held from before; block 3"):
        run_step(executor, make_run(make_spec(), [3, 4], start=4))


def test_blocks_of_another_prefix_are_caught():
    executor = make_executor()
    run_step(executor, make_run(make_spec("a"), [3, 4]))
    stranger = make_spec("b", token_ids=(5, 6, 7, 9, 9, 10))
    with pytest.raises(AssertionError, match="position 3"):
        run_step(executor, make_run(stranger, [3, 5], start=4))


def test_a_cached_block_of_the_same_prefix_is_accepted():
    executor = make_executor()
    run_step(executor, make_run(make_spec("a"), [3, 4]))
    run_step(executor, make_run(make_spec("b", token_ids=(5, 6, 7, 8, 1)), [3, 5], start=4))


def test_blocks_in_the_wrong_order_are_caught():
    executor = make_executor()
    spec = make_spec()
    run_step(executor, make_run(spec, [3, 4]))
    with pytest.raises(AssertionError, match="position 0"):
        run_step(executor, make_run(spec, [4, 3], start=6, known=[*spec.token_ids, 1]))


def test_two_runs_that_write_into_one_block_are_caught():
    executor = make_executor()
    with pytest.raises(AssertionError, match="overwritten"):
        run_step(
            executor, make_run(make_spec("a"), [1, 2]), make_run(make_spec("b", token_ids=(9, 9, 9, 9, 9)), [1, 3])
        )


def test_the_error_comes_with_the_result_and_later_steps_still_run():
    executor = make_executor()
    handle = executor.submit(StepPlan(runs=(make_run(make_spec(), [3], end=6),)))
    with pytest.raises(AssertionError, match="its blocks at 4"):
        handle.result()
    assert run_step(executor, make_run(make_spec(), [3, 4])).sampled


def test_swap_moves_the_content_and_out_comes_before_in():
    executor = make_executor()
    first, second = make_spec("a", token_ids=(1, 2, 3, 4)), make_spec("b", token_ids=(5, 6, 7, 8))
    run_step(executor, make_run(first, [3]))
    run_step(executor, swap_out=(BlockCopy(3, 0),))
    run_step(executor, make_run(second, [3]))
    exchange = {"swap_out": (BlockCopy(3, 1),), "swap_in": (BlockCopy(0, 3),)}
    run_step(executor, make_run(first, [3, 5], start=4, known=[1, 2, 3, 4, 9]), **exchange)
    run_step(executor, make_run(second, [6, 7], start=4, known=[5, 6, 7, 8, 9]), swap_in=(BlockCopy(1, 6),))


def test_a_missing_swap_in_is_caught():
    executor = make_executor()
    spec = make_spec(token_ids=(1, 2, 3, 4))
    run_step(executor, make_run(spec, [3]))
    run_step(executor, swap_out=(BlockCopy(3, 0),))
    with pytest.raises(AssertionError, match="position 0"):
        run_step(executor, make_run(spec, [6, 7], start=4, known=[1, 2, 3, 4, 9]))


def test_blocks_copied_as_bytes_continue_on_another_executor():
    source, target = make_executor(), make_executor()
    spec = make_spec()
    token_id = run_step(source, make_run(spec, [3, 4])).sampled["a"][0].token_id
    for read, write in ((3, 8), (4, 9)):
        for from_view, to_view in zip(source.kv.block_views(read), target.kv.block_views(write), strict=True):
            to_view[:] = from_view
    known = [*spec.token_ids, token_id]
    result = run_step(target, make_run(spec, [8, 9], start=6, known=known))
    assert result.sampled["a"][0].token_id == source.continuation(spec, 2)[1]


def test_bytes_that_arrived_damaged_are_caught():
    executor = make_executor()
    spec = make_spec()
    run_step(executor, make_run(spec, [3, 4]))
    executor.kv.block_views(3)[0][9] ^= 1
    with pytest.raises(AssertionError, match=r"position 1 .* 1 of 7 positions are wrong"):
        run_step(executor, make_run(spec, [3, 4], start=6, known=[*spec.token_ids, 1]))


def test_kv_of_another_model_is_caught():
    source, target = make_executor(model_identity="one"), make_executor(model_identity="two")
    run_step(source, make_run(make_spec(), [3, 4]))
    target.kv.block_views(3)[0][:] = source.kv.block_views(3)[0]
    with pytest.raises(AssertionError, match="position 0"):
        run_step(target, make_run(make_spec(), [3, 4], start=4))


def test_a_shared_pool_is_found_through_its_reference():
    executor = make_executor(shared=True)
    run_step(executor, make_run(make_spec(), [3, 4]))
    ref = executor.kv.shared_memory_ref()
    fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", os.O_RDONLY)
    try:
        mapping = mmap.mmap(fd, ref.num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    block_bytes = executor.layout.block_bytes
    start = executor.kv.group_offsets[0] + 3 * block_bytes
    assert mapping[: len(ref.cookie)] == ref.cookie
    assert mapping[start : start + block_bytes] == bytes(executor.kv.block_views(3)[0])
    executor.close()
    assert executor.kv.shared_memory_ref() is None


def test_end_of_sequence_comes_at_its_rate_and_not_before_min_tokens():
    executor = make_executor(eos_rate=0.25)
    spec = RequestSpec(
        request_id="a", token_ids=(1, 2), num_prompt_tokens=2, sampling=SamplingParams(min_tokens=2, max_tokens=9),
        eos_token_ids=(0,),
    )  # fmt: skip
    late = [executor.next_token(spec, [1, 2, 3, token_id]) for token_id in range(1000)]
    early = [executor.next_token(spec, [1, 2, token_id]) for token_id in range(1000)]
    assert 200 < late.count(0) < 300
    assert early.count(0) == 0


def test_logprobs_come_only_when_asked_for():
    executor = make_executor()
    spec = make_spec(logprobs=2, prompt_logprobs=1)
    result = run_step(executor, make_run(spec, [1, 2], end=4), make_run(make_spec("b"), [3, 4]))
    assert [entry.token_id for entry in result.prompt_logprobs["a"]] == [6, 7, 8, 9]
    assert "b" not in result.prompt_logprobs
    assert result.sampled["b"][0].logprobs is None
    result = run_step(executor, make_run(spec, [1, 2], start=4))
    assert [entry.token_id for entry in result.prompt_logprobs["a"]] == [10]
    assert len(result.sampled["a"][0].logprobs.top_ids) == 2
