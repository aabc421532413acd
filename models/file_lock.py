"""The lock of a file, waited for until a deadline: who has it is alone among the processes of a host."""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Iterator
from typing import BinaryIO, Final

from eagleray.core.clock import Clock

_POLL_INTERVAL_S: Final = 0.02  # the system's own wait has no deadline


@contextlib.contextmanager
def locked(file: BinaryIO, clock: Clock, until_s: float) -> Iterator[bool]:
    """Whether the file is ours alone inside; False when another has kept it until ``until_s`` on ``clock``.

    A process that dies gives its locks back. Who has inherited the descriptor, as a forked child has, does not keep it.

    Raises ``OSError`` where the file cannot be locked: some file systems give this lock to those only who may write.
    """
    is_ours = _take(file, clock, until_s)
    try:
        yield is_ours
    finally:
        if is_ours:
            fcntl.flock(file, fcntl.LOCK_UN)


def _take(file: BinaryIO, clock: Clock, until_s: float) -> bool:
    pause = threading.Event()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if clock.now_s() > until_s:
                return False
        pause.wait(_POLL_INTERVAL_S)
