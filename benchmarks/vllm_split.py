"""vLLM's own split on this machine: a prefill and a decode instance, KV over its NIXL connector, a proxy before both.

    python benchmarks/vllm_split.py --port 8123 --threads 1 -- vllm serve MODEL --dtype bfloat16

Listens when both instances do. They take the four ports after ``--port``, and ``--threads`` cores each.

Where no core is free beside those of the models, vLLM 0.32 with NIXL 1.5 is in its own way twice, and both are undone
from outside: its connector moves the model's first thread to the last core of the NUMA node, in both instances the
same; and NIXL's progress thread polls without ever waiting, on a core that a model computes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import uvicorn
from driver import last_line
from peers.split_proxy import create_proxy
from process_cpu import thread_times_s

_HOST: Final = "127.0.0.1"
_POLL_S: Final = 0.2
_START_TIMEOUT_S: Final = 300.0
_STOP_TIMEOUT_S: Final = 20.0
_REQUEST_TIMEOUT_S: Final = 600.0
_WATCH_S: Final = 2.0  # for threads that work though nobody asks for anything
_POLLS: Final = 0.2  # of that time at least; it may share its core


class InstanceError(RuntimeError):
    """An instance that did not start; the text says why."""


@dataclass(frozen=True)
class Instance:
    """One of the two."""

    name: str
    kv_role: str
    port: int
    side_channel_port: int  # over which the instances tell each other where their KV lies
    cores: Sequence[int]

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def command(self, server: Sequence[str]) -> list[str]:
        connector = {
            "kv_connector": "NixlConnector", "kv_role": self.kv_role, "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "fail",  # recomputing would hide that nothing was handed over
        }  # fmt: skip
        listen = ["--host", _HOST, "--port", str(self.port)]
        return [*server, *listen, "--kv-transfer-config", json.dumps(connector)]

    def environment(self) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(len(self.cores)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores)),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_channel_port),
        }


def instances(port: int, threads: int) -> tuple[Instance, Instance]:
    """Prefill and decode, with ``threads`` cores each."""
    return (
        Instance("prefill", "kv_producer", port + 1, port + 3, range(threads)),
        Instance("decode", "kv_consumer", port + 2, port + 4, range(threads, 2 * threads)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 after SIGTERM or SIGINT, 1 when an instance did not start."""
    options = _parser().parse_args(arguments)
    try:
        asyncio.run(_serve(options))
    except InstanceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


async def _serve(options: argparse.Namespace) -> None:
    """Raises ``InstanceError``."""
    both = instances(options.port, options.threads)
    async with AsyncExitStack() as stack:
        started = [await stack.enter_async_context(_started(instance, options.server)) for instance in both]
        prefill, decode = [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=instance.url, trust_env=False, timeout=_REQUEST_TIMEOUT_S)
            )
            for instance in both
        ]
        for process, client in zip(started, (prefill, decode), strict=True):
            await process.until_it_answers(client)
        for process in started:
            process.keep_to_its_cores()
        await let_pollers_yield([process.pid for process in started], _WATCH_S)
        config = uvicorn.Config(create_proxy(prefill, decode), host=_HOST, port=options.port, log_level="warning")
        await uvicorn.Server(config).serve()


@dataclass(frozen=True)
class _Started:
    instance: Instance
    process: asyncio.subprocess.Process
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    async def until_it_answers(self, client: httpx.AsyncClient) -> None:
        """Raises ``InstanceError`` when it ends before, or takes too long."""
        reason = f"did not answer in {_START_TIMEOUT_S:g} s"
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT_S):
                while self.process.returncode is None:
                    with suppress(httpx.HTTPError):
                        if (await client.get("/health")).is_success:
                            return
                    await asyncio.sleep(_POLL_S)
                reason = f"ended with {self.process.returncode}"
        raise InstanceError(f"the {self.instance.name} instance {reason}: {last_line(self.log)}")

    def keep_to_its_cores(self) -> None:
        for thread in thread_times_s(self.pid):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, self.instance.cores)


@asynccontextmanager
async def _started(instance: Instance, server: Sequence[str]) -> AsyncIterator[_Started]:
    with tempfile.NamedTemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *instance.command(server), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, **instance.environment()},
        )  # fmt: skip
        try:
            yield _Started(instance, process, Path(log.name))
        finally:
            await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError, TimeoutError):
        process.terminate()
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def let_pollers_yield(pids: Sequence[int], watch_s: float) -> None:
    """Threads of these processes, and of all below, that work while nothing is asked: from now on they get only the
    time that no other thread wants."""
    before = _times_s(pids)
    await asyncio.sleep(watch_s)
    for thread, time_s in _times_s(pids).items():
        if time_s - before.get(thread, 0.0) > _POLLS * watch_s:
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def _times_s(pids: Sequence[int]) -> dict[int, float]:
    return {thread: time_s for pid in pids for thread, time_s in thread_times_s(pid).items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm_split.py", description="Serve vLLM's prefill and decode apart.")
    add = parser.add_argument
    add("--port", type=int, default=8123, help="of the proxy")
    add("--threads", type=int, default=1, help="of each instance, on as many cores")
    add("server", nargs="+", help="after --: how vLLM is started, without its port")
    return parser


if __name__ == "__main__":
    sys.exit(main())
