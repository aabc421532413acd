"""The workers that an ingress is connected to: those listed, and those that still finish what they have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from eagleray.core.clock import SystemClock
from eagleray.core.config import EngineConfig, RouterConfig, TransferConfig
from eagleray.core.errors import WorkerLost
from eagleray.core.messages import Submit, TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.decode_workers.worker import build_decode_worker
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.workers.build import WorkerParts
from eagleray.workers.pool import ConnectedWorkers
from eagleray.workers.worker import Worker

TOKENIZER = byte_tokenizer()
SETTLE_DEADLINE_S = 5.0


def new_worker(worker_id: str) -> Worker:
    parts = WorkerParts(
        worker_id=worker_id,
        epoch=1,
        executor=FakeExecutor(num_blocks=64, max_model_tokens=1000),
        engine=EngineConfig(),
        transfer=TransferConfig(),
        new_text_stream=lambda spec: OutputText(TOKENIZER, spec.sampling, ()),
        clock=SystemClock(),
    )
    worker = build_decode_worker(parts, [])
    worker.start()
    return worker


@pytest.fixture
async def workers() -> AsyncIterator[tuple[Worker, Worker]]:
    both = new_worker("w1"), new_worker("w2")
    yield both
    for worker in both:
        await asyncio.to_thread(worker.stop)


@pytest.fixture
async def pool(workers: tuple[Worker, Worker]) -> AsyncIterator[ConnectedWorkers]:
    pool = ConnectedWorkers("test", RouterConfig(), SystemClock())
    pool.set_addresses({worker.address for worker in workers})
    await until(pool, lambda: pool.workers().keys() == {"w1", "w2"})
    yield pool
    await pool.aclose()


async def until(pool: ConnectedWorkers, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SETTLE_DEADLINE_S):
        while not holds():
            await pool.wait_for_change(0.1)


def new_spec(max_tokens: int) -> RequestSpec:
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return RequestSpec(request_id="a", token_ids=(1, 2, 3), num_prompt_tokens=3, sampling=sampling)


async def test_a_worker_that_is_not_listed_any_more_finishes_its_requests_and_gets_no_new_ones(
    workers: tuple[Worker, Worker], pool: ConnectedWorkers
) -> None:
    client, heard = pool.workers()["w1"], asyncio.Queue[TokenOutput | WorkerLost]()
    await client.submit(Submit(new_spec(500)), heard.put_nowait)
    pool.set_addresses({workers[1].address})
    assert pool.workers().keys() == {"w2"}
    outputs = []
    while not outputs or outputs[-1].finish_reason is None:
        output = await asyncio.wait_for(heard.get(), SETTLE_DEADLINE_S)
        assert isinstance(output, TokenOutput), output
        outputs.append(output)
    assert len(outputs) == 500
    await until(pool, lambda: client.is_lost)


async def test_an_idle_worker_that_is_not_listed_any_more_is_disconnected(
    workers: tuple[Worker, Worker], pool: ConnectedWorkers
) -> None:
    client = pool.workers()["w1"]
    pool.set_addresses({workers[1].address})
    await until(pool, lambda: client.is_lost)
    assert pool.workers().keys() == {"w2"}


async def test_a_worker_that_is_listed_again_is_connected_again(
    workers: tuple[Worker, Worker], pool: ConnectedWorkers
) -> None:
    pool.set_addresses(set())
    assert pool.workers() == {}
    pool.set_addresses({worker.address for worker in workers})
    await until(pool, lambda: pool.workers().keys() == {"w1", "w2"})


async def test_a_connection_that_breaks_is_made_again(workers: tuple[Worker, Worker], pool: ConnectedWorkers) -> None:
    first = pool.workers()["w1"]
    await first.aclose()
    await until(pool, lambda: "w1" in pool.workers() and pool.workers()["w1"] is not first)


async def test_a_worker_that_has_stopped_is_gone_at_once_though_it_is_listed(
    workers: tuple[Worker, Worker], pool: ConnectedWorkers
) -> None:
    await asyncio.to_thread(workers[0].stop)
    await until(pool, lambda: pool.workers().keys() == {"w2"})


async def test_closing_ends_the_connections_that_still_carry_requests_too(
    workers: tuple[Worker, Worker], pool: ConnectedWorkers
) -> None:
    client, heard = pool.workers()["w1"], asyncio.Queue[TokenOutput | WorkerLost]()
    await client.submit(Submit(new_spec(900)), heard.put_nowait)
    pool.set_addresses({workers[1].address})
    await asyncio.wait_for(pool.aclose(), SETTLE_DEADLINE_S)
    assert client.is_lost


async def test_an_address_that_nobody_listens_on_delays_nothing(
    workers: tuple[Worker, Worker], pool: ConnectedWorkers
) -> None:
    pool.set_addresses({"127.0.0.1:1", *(worker.address for worker in workers)})
    await pool.wait_for_change(0.2)
    assert pool.workers().keys() == {"w1", "w2"}
    pool.set_addresses({worker.address for worker in workers})


async def test_an_error_of_ours_while_a_connection_is_followed_is_logged_once_and_the_worker_connected_again(
    workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = ConnectedWorkers("test", RouterConfig(), SystemClock())
    num_errors = 2

    async def lost(client: object) -> None:
        nonlocal num_errors
        num_errors -= 1
        if num_errors >= 0:
            raise RuntimeError("a bug")

    monkeypatch.setattr(pool.caches, "lost", lost)
    pool.set_addresses({workers[0].address})
    for _ in range(3):
        await until(pool, lambda: bool(pool.workers()))
        client = pool.workers()["w1"]
        await client.aclose()
        await until(pool, lambda client=client: client not in pool.workers().values())
    await until(pool, lambda: bool(pool.workers()))
    assert caplog.text.count("ended unexpectedly") == 1
    await pool.aclose()
