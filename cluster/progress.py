"""How far the workers are with loading: told by each replica, shown by whoever waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import ray

REPORT_INTERVAL_S: Final = 0.2


class ProgressBoard:
    """A Ray actor's state: the newest word of each worker. Lives only while a service starts."""

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[int, int]] = {}

    def note(self, worker: str, loaded: int, total: int) -> None:
        self._loaded[worker] = (loaded, total)

    def lines(self) -> list[str]:
        return [f"{worker}: {loaded} of {total} tensors loaded" for worker, (loaded, total) in self._loaded.items()]


def new_board() -> Any:
    """A handle that can be given to replicas."""
    return ray.remote(ProgressBoard).options(num_cpus=0).remote()


def reporter(board: Any | None, worker: str) -> Callable[[int, int], None]:
    """What a loader calls with (tensors loaded, tensors in all); without a board nobody listens."""
    last_s = 0.0

    def report(loaded: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if board is not None and (loaded == total or now_s - last_s >= REPORT_INTERVAL_S):
            last_s = now_s
            board.note.remote(worker, loaded, total)  # nobody waits for it

    return report
