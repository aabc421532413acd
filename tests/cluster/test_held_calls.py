"""The calls by which Serve sees the work of its replicas: beside a request's way, and only for one that lasts.

A real ingress and real workers in one process. Serve's handles are played, and how long it is until a call is worth it
is up to the test.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from eagleray.cluster import ingress_process
from eagleray.cluster.ingress_process import IngressProcess
from eagleray.cluster.local import LocalCluster
from eagleray.core.config import Config, PoolConfig, parse_config
from eagleray.core.snapshot import Role
from eagleray.engine.execution.fake import FakeExecutor, FakeStep
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.text.fake import byte_tokenizer, save_byte_tokenizer
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
SETTLE_DEADLINE_S = 5.0
HOLD_AFTER_S = 12_345.0  # as nothing else waits


class GatedExecutor(FakeExecutor):
    """A step begins when it may."""

    def __init__(self) -> None:
        super().__init__(max_model_tokens=512, shared=True)
        self.may_step = threading.Event()
        self.may_step.set()

    def submit(self, plan: StepPlan) -> FakeStep:
        assert self.may_step.wait(SETTLE_DEADLINE_S)
        return super().submit(plan)


class Handle:
    """Of a deployment whose calls do not return."""

    def __init__(self) -> None:
        self.held: list[tuple[str, asyncio.Future[None]]] = []  # which replica is called, and the call
        self.hold = self

    def remote(self, request_id: str, *, target: str) -> asyncio.Future[None]:
        self.held.append((target, asyncio.get_running_loop().create_future()))
        return self.held[-1][1]


class Service:
    """An ingress of a prefill and a decode worker."""

    def __init__(self, config: Config) -> None:
        self.executors: dict[Role, GatedExecutor] = {}
        self.cluster = LocalCluster(config, self._new_executor, lambda spec: OutputText(TOKENIZER, spec.sampling, ()))
        self.handles = {role: Handle() for role in Role}
        self.ingress: IngressProcess
        self._due: list[Callable[[], object]] = []  # what is put off until a call is worth it
        self._num_due = asyncio.Semaphore(0)

    def _new_executor(self, role: Role, pool: PoolConfig) -> GatedExecutor:
        self.executors[role] = GatedExecutor()
        return self.executors[role]

    def addresses(self, handle: Handle) -> list[dict[str, str]]:
        """What Serve tells of a deployment's replicas."""
        workers = self.cluster.workers.values()
        return [{"address": worker.address} for worker in workers if self.handles[worker.role] is handle]

    def put_off(self, action: Callable[[], object]) -> None:
        self._due.append(action)
        self._num_due.release()

    async def until_each_worker_has_accepted(self) -> None:
        for _ in Role:
            await asyncio.wait_for(self._num_due.acquire(), SETTLE_DEADLINE_S)

    def pass_time(self) -> None:
        """So much that a call is worth it."""
        while self._due:
            self._due.pop()()

    async def ask(self) -> httpx.Response:
        """For tokens after a prompt that is long enough for the prefill worker."""
        body = {"model": "fish", "prompt": [*range(100)], "max_tokens": 8, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=self.ingress.address, timeout=SETTLE_DEADLINE_S) as client:
            return await client.post("/v1/completions", json=body)


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Service]:
    save_byte_tokenizer(tmp_path)
    service = Service(
        parse_config(
            {
                "model": {"path": str(tmp_path), "served_name": "fish"},
                "prefill": {"replicas": 1},
                "decode": {"replicas": 1},
                "router": {"local_prefill_tokens": 8},
                "index": {"backend": "memory"},
                "http": {"host": "127.0.0.1", "port": 0},
            }
        )
    )
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def put_off_or_call_later(delay_s: float, callback: Callable[..., object], *arguments: Any, **options: Any) -> Any:
        if delay_s == HOLD_AFTER_S:
            return service.put_off(partial(callback, *arguments))
        return call_later(delay_s, callback, *arguments, **options)

    monkeypatch.setattr(loop, "call_later", put_off_or_call_later)
    monkeypatch.setattr(ingress_process, "HOLD_AFTER_S", HOLD_AFTER_S)
    monkeypatch.setattr(ingress_process, "replica_metadata", service.addresses)
    async with service.cluster:
        service.ingress = IngressProcess(service.cluster.config, "ingress", service.handles)
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while len(service.ingress._pool.workers()) < len(Role):
                await service.ingress._pool.wait_for_change(1.0)
        yield service
        await service.ingress.aclose()


async def test_each_replica_that_has_a_request_is_called_and_nobody_waits_for_the_call(service: Service) -> None:
    service.executors[Role.PREFILL].may_step.clear()
    asking = asyncio.create_task(service.ask())
    await service.until_each_worker_has_accepted()
    assert not any(handle.held for handle in service.handles.values()), "it is not worth it yet"
    service.pass_time()
    service.executors[Role.PREFILL].may_step.set()
    answer = await asyncio.wait_for(asking, SETTLE_DEADLINE_S)
    assert answer.json()["usage"]["completion_tokens"] == 8
    for worker_id, worker in service.cluster.workers.items():
        ((replica, call),) = service.handles[worker.role].held
        assert replica == worker_id and not call.done()


async def test_no_replica_is_called_for_a_request_that_is_over_before_it_is_worth_it(service: Service) -> None:
    assert (await service.ask()).status_code == 200
    await service.until_each_worker_has_accepted()
    service.pass_time()
    assert not any(handle.held for handle in service.handles.values())
