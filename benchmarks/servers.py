"""The servers that are compared: how each is started, when it is ready, and that nothing of it is left."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Final

import httpx
from contenders import vllm_environment
from driver import last_line
from process_cpu import has_loaded
from random_checkpoint import FIRST_TEXT_TOKEN_ID

_START_TIMEOUT_S: Final = 300.0
_STOP_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.2
_PROBE_TIMEOUT_S: Final = 10.0
_VLLM_SPLIT: Final = Path(__file__).with_name("vllm_split.py")


class StartError(RuntimeError):
    """A server that cannot be measured; the text says why."""


@dataclass(frozen=True)
class Server:
    """How one is started."""

    command: Sequence[str]
    environment: Mapping[str, str]
    port: int
    can_be_stopped: bool = False  # by a signal, and go on later


def _eagleray(checkpoint: Path, options: argparse.Namespace, port: int) -> Server:
    return _our_server(checkpoint, options, port, prefill=0)


def _eagleray_split(checkpoint: Path, options: argparse.Namespace, port: int) -> Server:
    return _our_server(checkpoint, options, port, prefill=1)


def _our_server(checkpoint: Path, options: argparse.Namespace, port: int, prefill: int) -> Server:
    """Not to be stopped, or Ray's health checks would take it for dead; and idle it uses several percent of the
    cores."""
    command = [sys.executable, "-m", "eagleray.cli", "serve", "--model", str(checkpoint), "--dtype", "bfloat16"]
    command += ["--prefill", str(prefill), "--decode", "1", "--port", str(port)]
    max_model_tokens = options.prompt_tokens + options.output_tokens
    settings = {"model.max_model_tokens": max_model_tokens, "cores": "shared" if prefill else "own"}
    for pool in ("prefill", "decode"):
        settings |= {f"{pool}.num_threads": options.threads, f"{pool}.engine.kv_memory_bytes": options.kv_gib * 2**30}
    for assignment in (*(f"{key}={value}" for key, value in settings.items()), *options.set):
        command += ["--set", assignment]
    return Server(command, {}, port)


def _vllm(checkpoint: Path, options: argparse.Namespace, port: int) -> Server:
    server = _vllm_without_place(checkpoint, options, port)
    threads = {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}"}
    command = [*server.command, "--port", str(port)]
    return replace(server, command=command, environment={**server.environment, **threads})


def _vllm_eager(checkpoint: Path, options: argparse.Namespace, port: int) -> Server:
    server = _vllm(checkpoint, options, port)
    return replace(server, command=[*server.command, "--enforce-eager"])


def _vllm_split(checkpoint: Path, options: argparse.Namespace, port: int) -> Server:
    """Ports and cores of the two instances are the business of ``vllm_split.py``."""
    server = _vllm_without_place(checkpoint, options, port)
    _require_nixl(options.vllm_python)
    command = [sys.executable, str(_VLLM_SPLIT), "--port", str(port)]
    command += ["--threads", str(max(1, options.threads // 2)), "--", *server.command]
    return replace(server, command=command)


def _vllm_without_place(checkpoint: Path, options: argparse.Namespace, port: int) -> Server:
    """What all of vLLM's have in common: its command has no port and no cores yet."""
    if options.vllm_python is None:
        raise StartError("no --vllm-python was given")
    command = [str(options.vllm_python.with_name("vllm")), "serve", str(checkpoint), "--dtype", "bfloat16"]
    command += ["--no-enable-prefix-caching", "--max-model-len", str(options.prompt_tokens + options.output_tokens)]
    environment = vllm_environment(options.vllm_python)
    environment |= {"VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib), "HF_HUB_OFFLINE": "1"}
    return Server(command, environment, port, can_be_stopped=True)


def _require_nixl(python: Path) -> None:
    """Raises ``StartError``: vLLM itself would say so only after a minute."""
    command = [python, "-c", "import nixl._api"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_START_TIMEOUT_S, check=False)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise StartError(f"{python} has no NIXL that can be imported ({why}); install nixl there")


# By name, what builds one; raises ``StartError`` for what it lacks.
SERVERS: Final[Mapping[str, Callable[[Path, argparse.Namespace, int], Server]]] = {
    "eagleray": _eagleray,
    "eagleray-split": _eagleray_split,
    "vllm": _vllm,
    "vllm-eager": _vllm_eager,
    "vllm-split": _vllm_split,
}


@dataclass(frozen=True)
class Running:
    """A server that has answered."""

    server: Server
    pid: int
    start_s: float  # from the start of its process until it answered
    has_tcmalloc: bool

    def stop(self) -> None:
        """Until ``resume`` it takes nothing of the cores."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[Running]:
    """Afterwards the server and all that it started are gone. Raises ``StartError``."""
    _require_free(server.port)
    began_s = perf_counter()
    with tempfile.NamedTemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *server.command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, **server.environment}, start_new_session=True,
        )  # fmt: skip
        try:
            await _until_it_answers(process, server.port, Path(log.name))
            start_s = perf_counter() - began_s
            yield Running(server, process.pid, start_s, has_loaded(process.pid, "tcmalloc"))
        finally:
            await _stop(process)


def _require_free(port: int) -> None:
    """Raises ``StartError``: a server that is left over would be measured instead."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise StartError(f"port {port}: somebody serves there already; choose another --port")


async def _until_it_answers(process: asyncio.subprocess.Process, port: int, log: Path) -> None:
    """Until one token was generated: a server may list its model before its workers are up."""
    reason = f"did not answer in {_START_TIMEOUT_S:g} s"
    with suppress(TimeoutError):
        async with (
            asyncio.timeout(_START_TIMEOUT_S),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=_PROBE_TIMEOUT_S) as client,
        ):
            while process.returncode is None:
                with suppress(httpx.HTTPError):
                    models = await client.get("/v1/models")
                    body = {"model": models.json()["data"][0]["id"], "prompt": [FIRST_TEXT_TOKEN_ID], "max_tokens": 1}
                    if (await client.post("/v1/completions", json=body)).is_success:
                        return
                await asyncio.sleep(_POLL_S)
            reason = f"ended with {process.returncode}"
    raise StartError(f"{reason}: {last_line(log)}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError, TimeoutError):
        os.killpg(process.pid, signal.SIGCONT)  # what is stopped cannot end by itself
        process.terminate()
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
