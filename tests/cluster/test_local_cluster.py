"""The split, the router and fail-over in one process: real sockets, transfers and threads; a checking fake executor."""

from __future__ import annotations

import asyncio
import random

import pytest

from eagleray.cluster.local import LocalCluster
from eagleray.core.config import Config, PoolConfig, parse_config
from eagleray.core.messages import TokenOutput
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
ALONE = FakeExecutor(max_model_tokens=512)


def new_config(**changes: object) -> Config:
    engine = {"max_num_seqs": 31, "max_num_batched_tokens": 32, "num_blocks": 96, "block_size_tokens": 16}
    pool = {"replicas": 2, "engine": engine}
    values = {
        "prefill": pool,
        "decode": pool,
        "router": {"local_prefill_tokens": 8, "stall_deadline_s": 2.0},
        "transfer": {"transports": ["shared_memory", "tcp"], "stall_deadline_s": 1.0},
    }
    return parse_config(values | changes)


def new_executor(role: Role, pool: PoolConfig) -> FakeExecutor:
    engine = pool.engine
    assert engine.num_blocks is not None
    return FakeExecutor(
        num_blocks=engine.num_blocks, block_size_tokens=engine.block_size_tokens, max_model_tokens=512, shared=True
    )


def new_cluster(config: Config) -> LocalCluster:
    return LocalCluster(config, new_executor, lambda spec: OutputText(TOKENIZER, spec.sampling, ()))


def new_spec(name: str, num_prompt_tokens: int, max_tokens: int = 20, **sampling: object) -> RequestSpec:
    prompt = tuple(random.Random(name).choices(range(250), k=num_prompt_tokens))
    return RequestSpec(
        request_id=name,
        token_ids=prompt,
        num_prompt_tokens=num_prompt_tokens,
        sampling=SamplingParams(**{"max_tokens": max_tokens, "seed": 3, "ignore_eos": True, **sampling}),
    )


async def tokens_of(cluster: LocalCluster, spec: RequestSpec) -> list[int]:
    tokens: list[int] = []
    async for output in cluster.coordinator.generate(spec):
        assert output.position == len(tokens)
        tokens.extend(output.token_ids)
    return tokens


def expected(spec: RequestSpec) -> list[int]:
    return ALONE.continuation(spec, spec.sampling.max_tokens or 0)


async def assert_nothing_is_left(cluster: LocalCluster) -> None:
    """Within a second every block of every worker is free, and every account adds up."""
    async with asyncio.timeout(5):
        while any(
            client.snapshot.blocks_free != client.snapshot.blocks_total
            for client in cluster.coordinator.pool.workers().values()
        ):
            await cluster.coordinator.pool.wait_for_change(0.5)
    for worker in cluster.workers.values():
        await asyncio.to_thread(worker.check_integrity)


@pytest.mark.parametrize("transport", ["shared_memory", "tcp", "loopback"])
async def test_a_request_prefilled_on_one_worker_and_decoded_on_another_gets_its_own_tokens(transport: str) -> None:
    async with new_cluster(new_config(transfer={"transports": [transport]})) as cluster:
        spec = new_spec("a", 100)
        generation = cluster.coordinator.generate(spec)
        outputs = [output async for output in generation]
        assert [token for output in outputs for token in output.token_ids] == expected(spec)
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        account = generation.account
        assert account is not None and account.prefill_worker and account.prefill_worker.startswith("prefill")
        phases_s = account.queue_s + account.prefill_s + account.transfer_s + account.decode_s + account.network_s
        assert phases_s == pytest.approx(account.total_s)
        snapshot = cluster.workers[str(account.decode_worker)].snapshot
        await assert_nothing_is_left(cluster)
        snapshot = cluster.coordinator.pool.workers()[str(account.decode_worker)].snapshot
        assert snapshot.transfer_bytes_total == 7 * ALONE.layout.block_bytes
        assert snapshot.transfer_failures_total == 0


async def test_a_short_prompt_goes_straight_to_the_decode_worker() -> None:
    async with new_cluster(new_config()) as cluster:
        spec = new_spec("short", 6)
        generation = cluster.coordinator.generate(spec)
        assert [token async for output in generation for token in output.token_ids] == expected(spec)
        assert generation.account is not None and generation.account.prefill_worker is None


async def test_with_no_prefill_pool_the_decode_workers_do_both() -> None:
    async with new_cluster(new_config(prefill={"replicas": 0})) as cluster:
        spec = new_spec("a", 100)
        assert await tokens_of(cluster, spec) == expected(spec)


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "prefix_aware", "predicted_time"])
async def test_many_requests_at_once_do_not_mix_under_any_policy(policy: str) -> None:
    config = new_config(router={"policy": policy, "local_prefill_tokens": 8})
    async with new_cluster(config) as cluster:
        specs = [new_spec(str(number), 10 + 13 * (number % 9), 5 + number % 17) for number in range(40)]
        answers = await asyncio.gather(*(tokens_of(cluster, spec) for spec in specs))
        for spec, answer in zip(specs, answers, strict=True):
            assert answer == expected(spec)
        await assert_nothing_is_left(cluster)


async def test_a_request_that_ends_with_its_first_token_leaves_nothing_behind() -> None:
    async with new_cluster(new_config()) as cluster:
        spec = new_spec("one", 100, max_tokens=1)
        assert await tokens_of(cluster, spec) == expected(spec)
        await assert_nothing_is_left(cluster)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_worker_that_dies_loses_no_token(role: Role) -> None:
    async with new_cluster(new_config()) as cluster:
        specs = [new_spec(str(number), 90, 60) for number in range(12)]
        begun = asyncio.Event()

        async def answer(spec: RequestSpec) -> list[int]:
            tokens: list[int] = []
            async for output in cluster.coordinator.generate(spec):
                assert output.position == len(tokens)
                tokens.extend(output.token_ids)
                if len(tokens) >= (1 if role is Role.PREFILL else 5):
                    begun.set()
            return tokens

        tasks = [asyncio.create_task(answer(spec)) for spec in specs]
        await asyncio.wait_for(begun.wait(), 10)
        victim = next(worker_id for worker_id, worker in cluster.workers.items() if worker.role is role)
        await cluster.stop_worker(victim)
        for spec, tokens in zip(specs, await asyncio.gather(*tasks), strict=True):
            assert tokens == expected(spec)
        await assert_nothing_is_left(cluster)


async def test_requests_wait_for_a_worker_and_go_on_when_one_joins() -> None:
    async with new_cluster(new_config()) as cluster:
        for worker_id in [worker_id for worker_id, worker in cluster.workers.items() if worker.role is Role.DECODE]:
            await cluster.stop_worker(worker_id)
        spec = new_spec("patient", 50)
        task = asyncio.create_task(tokens_of(cluster, spec))
        cluster.start_worker(Role.DECODE)
        assert await asyncio.wait_for(task, 10) == expected(spec)


async def test_a_closed_generation_frees_its_blocks_on_every_worker() -> None:
    async with new_cluster(new_config()) as cluster:
        for stop_after in (0, 1, 3):
            generation = cluster.coordinator.generate(new_spec(f"abandoned {stop_after}", 120, 300))
            outputs = aiter(generation)
            for _ in range(stop_after):
                await anext(outputs)
            if stop_after == 0:
                first = asyncio.ensure_future(anext(outputs))
                await cluster.coordinator.pool.wait_for_change(1.0)
                await generation.aclose()
                with pytest.raises((StopAsyncIteration, asyncio.CancelledError)):
                    await first
            await generation.aclose()
            await assert_nothing_is_left(cluster)


async def test_random_hang_ups_under_load_leave_nothing_behind() -> None:
    chance = random.Random(5)
    async with new_cluster(new_config()) as cluster:

        async def maybe_hang_up(spec: RequestSpec, after: int | None) -> None:
            tokens: list[int] = []
            generation = cluster.coordinator.generate(spec)
            async for output in generation:
                tokens.extend(output.token_ids)
                if after is not None and len(tokens) >= after:
                    break
            await generation.aclose()
            assert tokens == expected(spec)[: len(tokens)]

        await asyncio.gather(
            *(
                maybe_hang_up(
                    new_spec(str(number), chance.randint(1, 200), chance.randint(1, 40)),
                    chance.choice([None, 1, 2, 7]),
                )
                for number in range(80)
            )
        )
        await assert_nothing_is_left(cluster)


async def test_several_choices_differ_share_the_prompt_and_each_equal_their_own_run() -> None:
    async with new_cluster(new_config()) as cluster:
        spec = new_spec("n", 100, 10, n=3)
        by_choice: dict[int, list[int]] = {0: [], 1: [], 2: []}
        outputs: list[TokenOutput] = []
        async for output in cluster.coordinator.generate(spec):
            by_choice[output.choice].extend(output.token_ids)
            outputs.append(output)
        assert len({tuple(tokens) for tokens in by_choice.values()}) == 3
        for choice, tokens in by_choice.items():
            alone = RequestSpec(
                request_id="x", token_ids=spec.token_ids, num_prompt_tokens=100, sampling=spec.sampling, choice=choice
            )
            assert tokens == ALONE.continuation(alone, 10)


async def test_the_second_request_of_a_conversation_goes_where_its_prefix_lies() -> None:
    async with new_cluster(new_config(router={"policy": "prefix_aware", "local_prefill_tokens": 8})) as cluster:
        first = cluster.coordinator.generate(new_spec("conversation", 160, 2))
        assert [output async for output in first]
        hits = 0
        async with asyncio.timeout(10):
            while not hits:  # the index hears of blocks in batches
                again = cluster.coordinator.generate(new_spec("conversation", 160, 2))
                assert [output async for output in again]
                assert again.account is not None
                hits = again.account.num_cached_tokens
        assert hits == 9 * 16
