"""As little as could stand in for the service: uvicorn, one hop to a process that says letters, and nothing else.

No routing, no scheduling, no text, no accounts: what remains is what sockets, two event loops and waking them take. The
same client asks it, beside the service, so the two compare.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
import uvicorn
from stream_load import Job, Window, measure_with_client

_EVENT: Final = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
_DONE: Final = b"data: [DONE]\n\n"
_START_TIMEOUT_S: Final = 30
_STOP_TIMEOUT_S: Final = 10

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Asked(msgspec.Struct):
    """What is read of a request; the null engine takes its pace from the seed too."""

    max_tokens: int
    seed: int


class Engine:
    """Says a letter for every stream at each step, in one message for all of them."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One line in: number of the stream, of letters, microseconds of a step. One line out: a step's streams."""
        left: dict[int, int] = {}
        stepping = None
        while line := await reader.readline():
            stream, num_tokens, step_us = map(int, line.split())
            left[stream] = num_tokens
            if stepping is None or stepping.done():
                stepping = asyncio.create_task(self._step(left, step_us * 1e-6, writer))

    async def _step(self, left: dict[int, int], step_s: float, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while left:
            next_s = loop.time() + step_s  # as the null engine: what is late is not caught up with
            writer.write(" ".join(map(str, left)).encode() + b"\n")
            for stream in tuple(left):
                left[stream] -= 1
                if not left[stream]:
                    del left[stream]
            await asyncio.sleep(max(0.0, next_s - loop.time()))


class Front:
    """An ASGI application that passes the engine's letters on."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: dict[int, asyncio.Queue[None]] = {}
        self._num_streams = 0

    async def connect(self) -> asyncio.Task[None]:
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return asyncio.create_task(self._receive_steps(reader))

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        asked = msgspec.json.decode(body, type=Asked)
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._answer(asked):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE})

    async def _answer(self, asked: Asked) -> AsyncIterator[bytes]:
        self._num_streams += 1
        stream, letters = self._num_streams, asyncio.Queue[None]()
        self._streams[stream] = letters
        self._writer.write(f"{stream} {asked.max_tokens} {asked.seed}\n".encode())
        for _ in range(asked.max_tokens):
            await letters.get()
            yield _EVENT
        del self._streams[stream]

    async def _receive_steps(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            for stream in line.split():
                if letters := self._streams.get(int(stream)):
                    letters.put_nowait(None)


def measure_bare(job: Job) -> Window:
    """With a new one each time: it does not hear of a client that hangs up."""
    with bare_service() as (address, processes):
        return measure_with_client(job, address, processes)


@contextlib.contextmanager
def bare_service() -> Iterator[tuple[str, dict[int, str]]]:
    """Its address, and its processes, id to name."""
    with contextlib.ExitStack() as ending:
        engine = ending.enter_context(_process("engine"))
        engine_port = _first_line(engine)
        front = ending.enter_context(_process("front", engine_port))
        port = _first_line(front)
        yield f"http://127.0.0.1:{port}", {engine.pid: "engine", front.pid: "front"}


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=_STOP_TIMEOUT_S)


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    has_said, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
    line = process.stdout.readline().strip() if has_said else ""
    if not line:
        raise RuntimeError("the bare service has not begun to listen")
    return line


async def _run_engine() -> None:
    server = await asyncio.start_server(Engine().serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _run_front(engine_port: int) -> None:
    front = Front(engine_port)
    receiving = await front.connect()
    config = uvicorn.Config(front, host="127.0.0.1", port=0, log_level="warning", access_log=False, lifespan="off")
    listening = config.bind_socket()
    listening.listen()
    print(listening.getsockname()[1], flush=True)
    await asyncio.gather(uvicorn.Server(config).serve([listening]), receiving)


if __name__ == "__main__":
    import uvloop

    uvloop.run(_run_engine() if sys.argv[1] == "engine" else _run_front(int(sys.argv[2])))
