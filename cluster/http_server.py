"""uvicorn on a socket of our own, and an end that lets answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, Final

import uvicorn

GRACEFUL_SHUTDOWN_S: Final = 5  # answers under way may take so long to end
STOP_DEADLINE_S: Final = GRACEFUL_SHUTDOWN_S + 2.0
TICK_S: Final = 1.0


class HttpServer:
    """Serves ``app`` from ``start`` to ``aclose``. Port 0: any free one; several servers of one host may share one."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind((host, port))
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # nobody asks who the client is
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        )
        self._server = _Server(config)

    def start(self) -> asyncio.Task[None]:
        """The task that serves; it ends early only when serving is not possible."""
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        return self._task

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{host}:{port}"

    async def aclose(self) -> None:
        """Take no new connection, let answers end for ``GRACEFUL_SHUTDOWN_S``, then break them off."""
        self._server.stop()
        await asyncio.wait([self._task], timeout=STOP_DEADLINE_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class _Server(uvicorn.Server):
    """One that looks up once a second, for the date that it sends, and not ten times for whether to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # 0: a whole second
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._stopping.wait()
