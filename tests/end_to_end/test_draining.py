"""A worker that is taken away while it serves: its requests finish where they are. A service of its own in a process of
its own, because one process can join only one Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT_DEADLINE_S = 240

SCRIPT = """
import asyncio, functools, json, sys, time

from eagleray.core.clock import SystemClock
from eagleray.core.config import Environment, parse_config, prepare_ray_environment

prepare_ray_environment()

import httpx
import openai
import ray
from ray import serve
from ray.serve._private.common import DeploymentID
from eagleray.cluster.serve_app import APPLICATION, LocalService

NUM_STREAMS, NUM_TOKENS, DEADLINE_S = 6, 400, 60

config = parse_config(
    {
        "model": {"dtype": "float32"},
        "prefill": {"replicas": 1},
        "decode": {"replicas": 2, "drain_deadline_s": DEADLINE_S},
        "router": {"policy": "round_robin", "local_prefill_tokens": 0},
        "index": {"backend": "memory"},
        "http": {"port": 0},
    }
)


serve.run = functools.partial(serve.run, external_scaler_enabled=True)


def scale_decode(num_replicas):
    # Deploying anew would replace every replica; a scaler changes the number alone.
    controller = serve.context._get_global_client()._controller
    decode = DeploymentID(name="decode", app_name=APPLICATION)
    ray.get(controller.update_deployment_replicas.remote(decode, num_replicas))


async def text_of(client, number, begun):
    stream = await client.chat.completions.create(
        model="eagleray-demo", messages=[{"role": "user", "content": f"Story {number}, please"}], stream=True,
        max_tokens=NUM_TOKENS, seed=number, extra_body={"ignore_eos": True},
    )
    text = ""
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
            begun.release()
    return text


async def texts(url, disturb):
    client, begun = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), asyncio.Semaphore(0)
    tasks = [asyncio.create_task(text_of(client, number, begun)) for number in range(NUM_STREAMS)]
    for _ in range(5 * NUM_STREAMS):
        await asyncio.wait_for(begun.acquire(), DEADLINE_S)
    await asyncio.to_thread(disturb)
    still_running = sum(not task.done() for task in tasks)
    return await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S), still_running


def decode_workers(url):
    status = httpx.get(f"{url}/v1/status").raise_for_status().json()
    return [worker["worker_id"] for worker in status["workers"] if worker["role"] == "decode"]


def wait_until(holds):
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return holds()


local = LocalService(config, Environment(), on_progress=lambda text: None, clock=SystemClock())
try:
    url = local.address
    wait_until(lambda: len(decode_workers(url)) == 2)
    undisturbed, _ = asyncio.run(texts(url, lambda: None))

    def take_one_away():
        scale_decode(1)
        wait_until(lambda: len(decode_workers(url)) == 1)

    disturbed, still_running = asyncio.run(texts(url, take_one_away))
    metrics = httpx.get(f"{url}/metrics").text.splitlines()
    found = {
        "same": disturbed == undisturbed,
        "still_running": still_running,
        "num_decode_workers": len(decode_workers(url)),
        "resumed": [line for line in metrics if line.startswith("eagleray_requests_resumed_total")],
        "stopped": wait_until(
            lambda: sum(serve.status().applications[APPLICATION].deployments["decode"].replica_states.values()) == 1
        ),
    }
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
finally:
    local.stop()
"""


@pytest.mark.slow
@pytest.mark.timeout(SCRIPT_DEADLINE_S + 20)
def test_a_replica_that_is_scaled_away_finishes_the_streams_that_it_has(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    run = [sys.executable, "-c", SCRIPT, str(file)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=SCRIPT_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(file.read_text())
    assert found["still_running"] > 0, "the streams were over before the replica was told to stop: nothing was tested"
    assert found["num_decode_workers"] == 1
    assert found["same"], "a stream differs from the one that nobody disturbed"
    assert found["resumed"] == ["eagleray_requests_resumed_total 0.0"], "a stream had to go on elsewhere"
    assert found["stopped"], "the replica was still there long after its last request"
