from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import pytest
from mooncake import TraceRequest, generate_trace, read_trace
from workload import Limits, ScheduledRequest, Workload, block_token_ids, build_workload, ideal_hits

LIMITS = Limits(max_model_tokens=2048, kv_block_tokens=16, token_ids=(100, 60_000))


def row(input_length: int, *hash_ids: int, output_length: int = 100, timestamp: float = 0) -> TraceRequest:
    return TraceRequest(timestamp, input_length, output_length, hash_ids)


def common_prefix(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def brute_force_hits(workload: Workload) -> list[tuple[int, int]]:
    """Each prompt compared with every earlier one, token by token."""
    size, prompts, hits = workload.limits.kv_block_tokens, [], []
    for request in workload.requests:
        prompt = workload.token_ids(request)
        shared = max((common_prefix(prompt, earlier) for earlier in prompts), default=0)
        hits.append((shared, min(shared, len(prompt) - 1) // size * size))
        prompts.append(prompt)
    return hits


def found_hits(workload: Workload) -> list[tuple[int, int]]:
    hits = ideal_hits(workload.requests, workload.scaling.block_tokens, workload.limits.kv_block_tokens)
    return [(hit.shared_tokens, hit.cacheable_tokens) for hit in hits]


def test_what_fits_is_not_scaled():
    workload = build_workload([row(600, 0, 1)], LIMITS, speedup=1, scale=None)
    assert (workload.scaling.factor, workload.scaling.num_cut) == (1.0, 0)
    assert workload.requests == (ScheduledRequest(0.0, 600, 100, (0, 1)),)


def test_the_longest_request_just_fits_the_model():
    longest = row(20_480, *range(40), output_length=400)
    for max_model_tokens, block_tokens in ((2048, 48), (40 * 48 + 38, 48), (40 * 48 + 37, 32)):
        limits = Limits(max_model_tokens, 16, (128, 255))
        workload = build_workload([row(600, 0, 1), longest], limits, speedup=1, scale=None)
        assert (workload.scaling.block_tokens, workload.scaling.num_cut) == (block_tokens, 0)
        assert max(r.num_prompt_tokens + r.num_output_tokens for r in workload.requests) <= max_model_tokens


def test_what_does_not_fit_at_one_kv_block_per_trace_block_is_cut_and_counted():
    longest = row(102_400, *range(200), output_length=1000)
    workload = build_workload([row(600, 0, 1), longest], LIMITS, speedup=1, scale=None)
    cut = workload.requests[1]
    assert (workload.scaling.block_tokens, workload.scaling.num_cut) == (16, 1)
    assert cut.num_prompt_tokens + cut.num_output_tokens == 2048
    assert len(workload.token_ids(cut)) == cut.num_prompt_tokens


@pytest.mark.parametrize(("scale", "block_tokens"), [(0.125, 64), (0.13, 64), (0.001, 16)])
def test_an_asked_scale_is_rounded_to_whole_kv_blocks(scale: float, block_tokens: int):
    workload = build_workload([row(600, 0, 1)], LIMITS, speedup=1, scale=scale)
    assert workload.scaling.block_tokens == block_tokens


def test_a_started_block_and_a_short_answer_keep_at_least_one_token():
    workload = build_workload([row(513, 0, 1, output_length=1)], LIMITS, speedup=1, scale=1 / 32)
    assert (workload.requests[0].num_prompt_tokens, workload.requests[0].num_output_tokens) == (17, 1)


def test_the_schedule_begins_at_once_and_runs_at_the_asked_speed():
    rows = [row(9, 0, timestamp=6000), row(9, 0, timestamp=9000), row(9, 0, timestamp=15_000)]
    workload = build_workload(rows, LIMITS, speedup=2, scale=None)
    assert [request.due_s for request in workload.requests] == [0.0, 1.5, 4.5]


def test_prompts_share_exactly_the_blocks_that_their_hash_ids_share():
    rows = [row(1536, 0, 1, 2), row(1536, 0, 1, 3), row(1536, 0, 4, 2)]
    workload = build_workload(rows, LIMITS, speedup=1, scale=1 / 16)
    first, second, third = (workload.token_ids(request) for request in workload.requests)
    assert common_prefix(first, second) == 64
    assert common_prefix(first, third) == 32
    assert first[64:] == third[64:]  # an equal id is an equal block, wherever it stands


def test_tokens_are_the_same_everywhere_and_within_the_asked_ids():
    assert block_token_ids(5, 6, (128, 255)) == [199, 190, 137, 246, 180, 240]
    assert set(block_token_ids(1, 2000, (7, 9))) == {7, 8, 9}


def test_the_ideal_cache_of_hand_made_prompts():
    requests = [
        ScheduledRequest(0, 40, 1, (0, 1)),
        ScheduledRequest(0, 40, 1, (0, 1)),  # all of it, but its last token is computed
        ScheduledRequest(0, 32, 1, (0,)),  # ends with a whole block, of which the last token is computed
        ScheduledRequest(0, 70, 1, (0, 1, 2)),  # the second block was seen in part only
        ScheduledRequest(0, 96, 1, (3, 1, 2)),  # an equal block after another prefix is no hit
    ]
    hits = ideal_hits(requests, block_tokens=32, kv_block_tokens=16)
    assert [(hit.shared_tokens, hit.cacheable_tokens) for hit in hits] == [(0, 0), (40, 32), (32, 16), (40, 32), (0, 0)]


@pytest.mark.parametrize("kv_block_tokens", [16, 48])
def test_the_ideal_cache_equals_a_comparison_of_all_prompts(kv_block_tokens: int):
    limits = Limits(4096, kv_block_tokens, (100, 60_000))
    workload = build_workload(generate_trace(150, seed=3), limits, speedup=1, scale=None)
    found = found_hits(workload)
    assert found == brute_force_hits(workload)
    assert sum(cacheable for _, cacheable in found) > 0


def test_the_ideal_cache_equals_a_comparison_of_all_prompts_of_the_published_trace(published_trace: Path):
    workload = build_workload(read_trace(published_trace, count=2000)[::10], LIMITS, speedup=1, scale=None)
    assert found_hits(workload) == brute_force_hits(workload)


def test_scaling_keeps_the_share_of_the_published_trace_that_is_reused(published_trace: Path):
    rows = read_trace(published_trace, count=2000)
    huge = Limits(200_000, 16, (100, 60_000))
    ratios = []
    for scale in (1.0, 1 / 32):
        workload = build_workload(rows, huge, speedup=1, scale=scale)
        total = sum(request.num_prompt_tokens for request in workload.requests)
        ratios.append(sum(shared for shared, _ in found_hits(workload)) / total)
    assert ratios[0] == pytest.approx(0.2941, abs=0.0001)
    assert ratios[1] == pytest.approx(ratios[0], abs=0.002)
