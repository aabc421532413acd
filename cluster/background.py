"""A coroutine that goes on for as long as a replica lives, beside whatever the replica's own threads do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Final

RESTART_DELAY_S: Final = 1.0
STOP_DEADLINE_S: Final = 5.0

logger = logging.getLogger("eagleray")


class BackgroundLoop:
    """Runs ``work()`` on an event loop of its own thread until ``stop``, then ``close()`` there.

    What ``work`` raises is logged, and it is run again: nothing it does is worth a worker and its requests.
    """

    def __init__(self, name: str, work: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
        self._name, self._work, self._close = name, work, close
        self._stopping = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel the work and wait until it has cleaned up, for at most ``STOP_DEADLINE_S``."""
        self._stopping.set()
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(STOP_DEADLINE_S)

    # ---- on the thread

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _serve(self) -> None:
        with contextlib.closing(self._loop), contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        self._task = asyncio.current_task()
        try:
            while not self._stopping.is_set():
                try:
                    await self._work()
                except Exception:
                    logger.exception("%s failed; it is started again in %s s", self._name, RESTART_DELAY_S)
                await asyncio.sleep(RESTART_DELAY_S)
        finally:
            await self._close()
