"""A source in a process of its own, which a test can stop or kill: a prefill worker as it looks from outside."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Final

from eagleray.core.clock import SystemClock
from eagleray.core.config import TransferConfig
from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.fake import Calls, MemoryBlockStore
from eagleray.kv_transfer.session import SourceProgress
from eagleray.kv_transfer.source import KVSource

_DEADLINE_S: Final = 60.0  # a new interpreter on a busy machine


class SourceProcess:
    """A context manager. Block b of its pool holds ``MemoryBlockStore.fill(b, f"block {b}")``."""

    def __init__(self, layout: KVLayout, num_blocks: int, config: TransferConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        arguments = (child_end, layout, num_blocks, config)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        child_end.close()
        self.region: Final[KVRegion] = self._answer()

    def __enter__(self) -> SourceProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def open(self, request_id: str) -> None:
        self._ask("open", request_id)

    def announce(self, request_id: str, block_ids: Sequence[int], num_tokens: int, is_last: bool = False) -> None:
        """With ``is_last`` the sampled token is 7."""
        token_ids = (7,) if is_last else ()
        self._ask("announce", request_id, SourceProgress(tuple(block_ids), num_tokens, is_last, token_ids))

    def wait_released(self, count: int) -> list[str]:
        """The first ``count`` or more requests that ``on_released`` was called with."""
        released: list[str] = self._ask("released", count)
        return released

    def freeze(self) -> None:
        """Stop the process where it is; it keeps its connections."""
        os.kill(self._pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End it without notice. May be repeated."""
        self._process.kill()
        self._process.join(_DEADLINE_S)
        self._pipe.close()

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _ask(self, command: str, *arguments: object) -> Any:
        self._pipe.send((command, *arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(_DEADLINE_S):
            raise TimeoutError(f"the source process did not answer within {_DEADLINE_S:g} s")
        return self._pipe.recv()


def _serve(pipe: Connection, layout: KVLayout, num_blocks: int, config: TransferConfig) -> None:
    """The other process: answers commands until its pipe closes."""
    store = MemoryBlockStore(layout, num_blocks, shared=True)
    for block_id in range(num_blocks):
        store.fill(block_id, f"block {block_id}")
    released: Calls[str] = Calls()
    source = KVSource(store.region("other-process"), store, SystemClock(), config, released)
    commands: dict[str, Callable[..., object]] = {
        "open": source.open,
        "announce": source.announce,
        "released": released.wait,
    }
    pipe.send(source.region)
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(commands[command](*arguments))
