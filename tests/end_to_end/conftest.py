"""One real service for all end-to-end tests: Ray Serve, a Redis-protocol server, worker processes, HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from eagleray.core.clock import SystemClock
from eagleray.core.config import Environment, parse_config, prepare_ray_environment

MODEL = "eagleray-demo"
SETTLE_DEADLINE_S = 60.0


class Service:
    """What the tests do to the running service."""

    def __init__(self, local: Any) -> None:
        self.local = local
        self.url: str = local.address
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def new_async_openai(self) -> openai.AsyncOpenAI:
        """One for each event loop: its connections belong to the loop that made them."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def status(self) -> dict[str, Any]:
        return self.http.get("/v1/status").raise_for_status().json()

    def workers(self, role: str | None = None) -> dict[str, dict[str, Any]]:
        workers = {worker["worker_id"]: worker for worker in self.status()["workers"]}
        return {name: worker for name, worker in workers.items() if role in (None, worker["role"])}

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").raise_for_status().text)
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def wait_until(self, holds: Callable[[], bool], what: str, deadline_s: float = SETTLE_DEADLINE_S) -> float:
        """Seconds until ``holds()``; fails the test when that does not come before the deadline."""
        start_s = time.monotonic()
        while not holds():
            assert time.monotonic() - start_s < deadline_s, f"not within {deadline_s} s: {what}"
            time.sleep(0.02)
        return time.monotonic() - start_s

    def wait_until_whole(self) -> None:
        """All workers are there, and every block of each of them is free."""

        def whole() -> bool:
            workers = self.workers().values()
            return len(workers) == 4 and all(w["blocks_free"] == w["blocks_total"] for w in workers)

        self.wait_until(whole, "four workers with all blocks free")


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    prepare_ray_environment()
    from eagleray.cluster.serve_app import LocalService

    engine = {"num_blocks": 256, "max_num_batched_tokens": 128}
    config = parse_config(
        {
            "model": {"dtype": "float32"},
            "speculation": {"method": "eagle3", "model": "demo", "adaptive": False},  # at every step, however fast
            "prefill": {"replicas": 2, "engine": engine, "drain_deadline_s": 5},
            "decode": {"replicas": 2, "engine": engine, "drain_deadline_s": 5},
            "router": {"policy": "prefix_aware", "stall_deadline_s": 3.0, "local_prefill_tokens": 16},
            "transfer": {"stall_deadline_s": 2.0},
            "http": {"port": 0},
        }
    )
    local = LocalService(config, Environment(), on_progress=lambda text: None, clock=SystemClock())
    try:
        service = Service(local)
        service.wait_until(lambda: len(service.workers()) == 4, "four workers connected")
        yield service
    finally:
        local.stop()


@pytest.fixture
def whole_service(service: Service) -> Iterator[Service]:
    """Nothing is lost or leaked before a test, nor after it."""
    service.wait_until_whole()
    yield service
    service.wait_until_whole()
