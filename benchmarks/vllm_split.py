"""vLLM's own split on this machine: a prefill and a decode instance, KV over its NIXL connector, a proxy before both.

    python benchmarks/vllm_split.py --port 8123 --threads 1 -- vllm serve MODEL --dtype bfloat16

Listens when both instances do. They take the four ports after ``--port``, and the cores one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import uvicorn
from driver import last_line
from peers.split_proxy import create_proxy
from process_cpu import descendants

_HOST: Final = "127.0.0.1"
_POLL_S: Final = 0.2
_START_TIMEOUT_S: Final = 300.0
_REQUEST_TIMEOUT_S: Final = 600.0


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
