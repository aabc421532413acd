"""The real service around executors that compute nothing, and the same engine without a service."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec
from null_engine import new_null_executor
from process_cpu import descendants
from stream_load import Job, Window, measure_with_client

from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, Environment, parse_config, prepare_ray_environment
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.core_turns import OwnCores
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

MAX_STREAMS: Final = 64
LOCAL_PREFILL_TOKENS: Final = 32  # a longer prompt is prefilled on the prefill worker
_REPLICA_TITLE: Final = "ray::ServeReplica:eagleray:"
_INDEX_TITLES: Final = ("valkey-server", "redis-server")
INDEX, RAY = "index", "Ray's own"  # processes beside those that requests pass through
_CONNECTED_DEADLINE_S: Final = 60.0


@dataclass(frozen=True)
class NullService:
    """Where it listens, and its processes, id to name: one each that requests and tokens pass through, the prefix
    index's server, and all that Ray needs."""

    address: str
    model: str
    processes: dict[int, str]

    def measure(self, job: Job) -> Window:
        return measure_with_client(job, self.address, self.processes)


def request_body(model: str, prompt: str, num_tokens: int, step_us: int, salt: str) -> str:
    """Of a chat for the null engine, which says a token every ``step_us``. Salts share no cached prefix."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "seed": step_us,  # what the null engine takes its pace from
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_timing": True,
        "cache_salt": salt,
    }
    return msgspec.json.encode(body).decode()


@contextlib.contextmanager
def null_service() -> Iterator[NullService]:
    """One ingress, one prefill and one decode worker, the prefix index's server if there is one, as Ray starts them.
    What Ray prints meanwhile goes to stderr: stdout is the report's, which may go to a file."""
    prepare_ray_environment()
    from eagleray.cluster.serve_app import LocalService

    config = _config()
    with contextlib.redirect_stdout(sys.stderr):
        service = LocalService(config, Environment(), print, SystemClock(), new_null_executor)
        try:
            with httpx.Client(base_url=service.address, trust_env=False) as client:
                _wait_until_connected(client)
            names = {pid: _name_of(title) for pid, title in sorted(descendants(os.getpid()).items())}
            yield NullService(service.address, config.model.name, names)
        finally:
            service.stop()


def _name_of(title: str) -> str:
    if any(server in title for server in _INDEX_TITLES):
        return INDEX
    return title.removeprefix(_REPLICA_TITLE) if title.startswith(_REPLICA_TITLE) else RAY


class DirectEngine:
    """The same engine on the same kind of executor, called by whoever wants a token."""

    def __init__(self) -> None:
        config = _config()
        folder = config.model.folder
        self._tokenizer = Tokenizer.from_folder(folder)
        self._template = ChatTemplate.from_folder(folder, self._tokenizer)
        pool = config.decode.engine
        executor = new_null_executor(
            config.model,
            pool,
            num_threads=None,
            shared_kv=False,
            progress=None,
            end_phase=_ignore,
            speculation=None,
            turns=OwnCores(),
        )
        self._engine = Engine(executor, pool, SystemClock(), self._new_text)
        self._num_requests = 0

    def first_token_s(self, prompt: str) -> float:
        """From a prompt in words to one token as text."""
        start_s = time.perf_counter()
        text = self._template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        token_ids = tuple(self._tokenizer.encode(text, False))
        self._num_requests += 1
        name = str(self._num_requests)
        sampling = SamplingParams(max_tokens=1, seed=0)
        spec = RequestSpec(
            request_id=name, token_ids=token_ids, num_prompt_tokens=len(token_ids), sampling=sampling, tenant_salt=name
        )
        self._engine.add(spec)
        while not self._engine.step().outputs:
            pass
        return time.perf_counter() - start_s

    def _new_text(self, spec: RequestSpec) -> OutputText:
        return OutputText(self._tokenizer, spec.sampling, spec.token_ids)


def _ignore(phase: str) -> None:
    """Nobody times the start of this one."""


def _config() -> Config:
    pool = {"replicas": 1, "engine": {"max_num_seqs": MAX_STREAMS}, "drain_deadline_s": 1}
    router = {"local_prefill_tokens": LOCAL_PREFILL_TOKENS, "policy": "prefix_aware"}
    return parse_config({"prefill": pool, "decode": pool, "router": router, "http": {"port": 0}})


def _wait_until_connected(client: httpx.Client) -> None:
    deadline_s = time.monotonic() + _CONNECTED_DEADLINE_S
    while len(client.get("/v1/status").raise_for_status().json()["workers"]) < 2:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the ingress has not found its workers within {_CONNECTED_DEADLINE_S:.0f} s")
        time.sleep(0.05)
