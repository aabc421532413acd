"""A client light enough to sit on the machine that it measures: raw sockets, nothing decoded before the end.

A program of its own, so that its processor time is its own: ``python stream_load.py < job.json > result.json``.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from process_cpu import ProcessUse, read_use

_END_OF_BODY: Final = b"0\r\n\r\n"
_FIRST_EVENT: Final = b"data: "
_START_DEADLINE_S: Final = 30.0
_LOAD_DEADLINE_S: Final = 120.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """``bodies`` go round robin to ``num_connections``; each sends its next one when an answer has ended.

    The window opens ``settle_s`` after every connection has received something, and lasts ``window_s``.
    """

    host: str
    port: int
    path: str
    bodies: tuple[str, ...]
    num_connections: int
    settle_s: float
    window_s: float
    gap_s: float = 0.0  # between an answer's end and the next request of its connection
    num_rounds: int | None = None  # requests of each connection; None: no end
    pids: tuple[int, ...]  # whose use is read when the window opens and closes


class Exchange(msgspec.Struct):
    """One request, as bytes came. Times in seconds on one clock."""

    sent_s: float
    first_event_s: float = 0.0
    end_s: float = 0.0
    reads: list[tuple[float, bytes]] = []


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What happened between the two readings of processor time."""

    duration_s: float
    num_tokens: int  # letters of text: the null engine says one letter a token
    num_events: int
    num_reads: int  # of the client's sockets
    num_bytes: int
    num_answers: int  # that ended in it
    first_event_s: tuple[float, ...]  # of requests sent in it: from sending to the first event
    answer_s: tuple[float, ...]  # and to the answer's end
    accounts_s: dict[str, float]  # means of the answers' own time accounts
    processes: dict[int, ProcessUse]
    client_cpu_s: float


class Connection(asyncio.Protocol):
    """Sends ``bodies`` one after the other for as long as it is open."""

    def __init__(self, job: Job, bodies: list[bytes]) -> None:
        self._job, self._bodies = job, bodies
        self._next = 0
        self.exchanges: list[Exchange] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        exchange = self.exchanges[-1]
        now_s = time.perf_counter()
        exchange.reads.append((now_s, data))
        if not exchange.first_event_s and _FIRST_EVENT in data:
            exchange.first_event_s = now_s
        if data.endswith(_END_OF_BODY):
            exchange.end_s = now_s
            asyncio.get_running_loop().call_later(self._job.gap_s, self._send)

    def close(self) -> None:
        self._transport.abort()

    @property
    def has_heard(self) -> bool:
        return any(exchange.first_event_s for exchange in self.exchanges[:1])

    def _send(self) -> None:
        job = self._job
        if self._next == job.num_rounds:
            return
        body = self._bodies[self._next % len(self._bodies)]
        self._next += 1
        head = f"POST {job.path} HTTP/1.1\r\nHost: {job.host}\r\nContent-Type: application/json\r\n"
        self.exchanges.append(Exchange(time.perf_counter(), reads=[]))
        self._transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


async def run(job: Job) -> Window:
    """Raises ``TimeoutError`` when the server does not begin, ``ValueError`` for an answer that is none."""
    loop = asyncio.get_running_loop()
    encoded = [body.encode() for body in job.bodies]
    connections = []
    for index in range(job.num_connections):
        mine = encoded[index :: job.num_connections]
        _, connection = await loop.create_connection(lambda bodies=mine: Connection(job, bodies), job.host, job.port)
        connections.append(connection)
    try:
        async with asyncio.timeout(_START_DEADLINE_S):
            while not all(connection.has_heard for connection in connections):
                await asyncio.sleep(0.01)
        await asyncio.sleep(job.settle_s)
        return await _measure(job, connections)
    finally:
        for connection in connections:
            connection.close()


async def _measure(job: Job, connections: list[Connection]) -> Window:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    before = _uses(job.pids)
    await asyncio.sleep(job.window_s)
    after = _uses(job.pids)
    end_s, client_cpu_s = time.perf_counter(), time.process_time() - start_cpu_s
    exchanges = [exchange for connection in connections for exchange in connection.exchanges]
    reads = [data for exchange in exchanges for read_s, data in exchange.reads if start_s <= read_s < end_s]
    chunks = [_decode_chunk(event) for exchange in exchanges for event in _events(exchange, start_s, end_s)]
    return Window(
        duration_s=end_s - start_s,
        num_tokens=sum(map(_num_letters, chunks)),
        num_events=len(chunks),
        num_reads=len(reads),
        num_bytes=sum(map(len, reads)),
        num_answers=sum(start_s <= exchange.end_s < end_s for exchange in exchanges),
        first_event_s=tuple(
            exchange.first_event_s - exchange.sent_s
            for exchange in exchanges
            if start_s <= exchange.sent_s and start_s < exchange.first_event_s < end_s
        ),
        answer_s=tuple(
            exchange.end_s - exchange.sent_s
            for exchange in exchanges
            if start_s <= exchange.sent_s and start_s < exchange.end_s < end_s
        ),
        accounts_s=_mean_account([chunk.timing for chunk in chunks if chunk.timing]),
        processes={pid: use.since(before[pid]) for pid, use in after.items() if pid in before},
        client_cpu_s=client_cpu_s,
    )


def _uses(pids: tuple[int, ...]) -> dict[int, ProcessUse]:
    uses = {}
    for pid in pids:
        with suppress(FileNotFoundError):  # Ray ends processes that have nothing to do
            uses[pid] = read_use(pid)
    return uses


def _events(exchange: Exchange, start_s: float, end_s: float) -> list[bytes]:
    """Payloads that arrived between the two moments, the end mark left out. Raises ``ValueError`` for an error."""
    first = exchange.reads[0][1] if exchange.reads else b""
    if first and not first.startswith(b"HTTP/1.1 200"):
        raise ValueError(f"the server refused: {first[:500]!r}")
    data = b"".join(data for read_s, data in exchange.reads if start_s <= read_s < end_s)
    lines = (line.removeprefix(_FIRST_EVENT) for line in data.split(b"\n") if line.startswith(_FIRST_EVENT))
    return [line for line in lines if line.startswith(b"{") and line.endswith(b"}")]


class _Delta(msgspec.Struct):
    content: str = ""


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    choices: list[_Choice]
    timing: dict[str, Any] | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


def _num_letters(chunk: _Chunk) -> int:
    return sum(len(choice.delta.content) for choice in chunk.choices)


def _mean_account(accounts: list[dict[str, Any]]) -> dict[str, float]:
    """By name; the parts of the queue as ``queue.read_s`` and so on."""
    flat = [account | {f"queue.{name}": s for name, s in (account.get("queue") or {}).items()} for account in accounts]
    names = [name for name in flat[0] if name.endswith("_s")] if flat else []
    return {name: sum(account[name] for account in flat) / len(flat) for name in names}


def measure_with_client(job: Job, address: str, processes: Mapping[int, str]) -> Window:
    """Have the client, a process of its own, do ``job`` there. Raises ``RuntimeError`` in the client's words."""
    url = urlsplit(address)
    job = msgspec.structs.replace(job, host=url.hostname, port=url.port, pids=tuple(processes))
    command, given = [sys.executable, __file__], msgspec.json.encode(job)
    done = subprocess.run(command, input=given, capture_output=True, timeout=_LOAD_DEADLINE_S, check=False)
    if done.returncode:
        raise RuntimeError(f"the client failed: {done.stderr.decode(errors='replace')}")
    return msgspec.json.decode(done.stdout, type=Window)


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(run(job))))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
