"""What we lean on in Serve's internals, on the pinned Ray. A script of its own: one process can join only one Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT_DEADLINE_S = 110
NUM_REPLICAS, NUM_CALLS = 3, 40

SCRIPT = """
import asyncio, json, sys, time

from eagleray.core.config import prepare_ray_environment

prepare_ray_environment()

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from eagleray.cluster.ray_adapter import TargetedRouter, replica_metadata

NUM_REPLICAS, NUM_CALLS = int(sys.argv[1]), int(sys.argv[2])


@serve.deployment(
    num_replicas=NUM_REPLICAS,
    max_ongoing_requests=1000,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig(request_router_class=TargetedRouter),
)
class Target:
    def __init__(self):
        self._replica_id = serve.get_replica_context().replica_id.unique_id

    async def record_replica_metadata(self):
        return {"told": self._replica_id}

    async def whoami(self, target=None):
        await asyncio.sleep(0.05)  # so that all calls are under way at once
        return self._replica_id


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Parent:
    def __init__(self, targets):
        self._targets = targets

    async def told(self):
        return sorted(entry.get("told", "") for entry in replica_metadata(self._targets))

    async def call_all(self, replica_ids):
        responses = [self._targets.whoami.remote(target=replica_id) for replica_id in replica_ids]
        return await asyncio.wait_for(asyncio.gather(*responses), 30)

    async def call_anyone(self):
        return await asyncio.wait_for(self._targets.whoami.remote(), 30)

    async def call_nobody(self):
        start_s = time.monotonic()
        try:
            await asyncio.wait_for(self._targets.whoami.remote(target="vanished"), 30)
        except Exception as error:
            return type(error).__name__, str(error), time.monotonic() - start_s


def told_by(parent):
    deadline_s = time.monotonic() + 30
    while len(told := parent.told.remote().result(timeout_s=30)) < NUM_REPLICAS and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return told


ray.init(
    address="local",
    namespace="ray-adapter-guard",
    num_cpus=2,
    _node_ip_address="127.0.0.1",
    include_dashboard=False,
    log_to_driver=False,
    configure_logging=False,
)
try:
    serve.start(proxy_location="Disabled")
    parent = serve.run(Parent.bind(Target.bind()), name="guard", route_prefix=None)
    told = told_by(parent)
    wanted = [told[number % len(told)] for number in range(NUM_CALLS)]
    found = {
        "told": told,
        "wanted": wanted,
        "reached": parent.call_all.remote(wanted).result(timeout_s=40),
        "anyone": parent.call_anyone.remote().result(timeout_s=40),
        "nobody": parent.call_nobody.remote().result(timeout_s=40),
    }
    with open(sys.argv[3], "w") as file:  # Ray prints what it likes
        json.dump(found, file)
finally:
    serve.shutdown()
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("ray_adapter") / "found.json"
    run = [sys.executable, "-c", SCRIPT, str(NUM_REPLICAS), str(NUM_CALLS), str(file)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=SCRIPT_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(file.read_text()))


def test_replicas_tell_of_themselves_without_being_asked(found: dict[str, Any]) -> None:
    assert len(set(found["told"])) == NUM_REPLICAS and "" not in found["told"]


def test_forty_calls_at_once_of_one_request_each_reach_their_own_replica(found: dict[str, Any]) -> None:
    assert len(found["reached"]) == NUM_CALLS
    assert found["reached"] == found["wanted"]


def test_a_call_without_a_target_reaches_some_replica(found: dict[str, Any]) -> None:
    assert found["anyone"] in found["told"]


def test_a_call_to_a_replica_that_has_vanished_fails_at_once_saying_so(found: dict[str, Any]) -> None:
    name, words, waited_s = found["nobody"]
    assert "ReplicaGone" in name or "ReplicaGone" in words
    assert "vanished" in words
    assert waited_s < 10, "it must not wait for the replica to come back"
