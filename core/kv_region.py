"""Where a worker's KV blocks lie, as told to the workers that read them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

import msgspec

from eagleray.core.kv_layout import KVLayout

_BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")


class SharedMemoryRef(msgspec.Struct, frozen=True):
    """An anonymous memory file of a living process on this host; it vanishes with the process, whatever kills it.

    A reader opens ``/proc/{pid}/fd/{fd}``, which works exactly when both see the same process table and user.
    ``cookie`` lies at the start of the file and tells a reused pid from the real owner.
    """

    host_id: str  # boot id of the machine: equal on both sides or the reference is useless
    pid: int
    fd: int
    num_bytes: int
    cookie: bytes


class KVRegion(msgspec.Struct, frozen=True):
    """One pool of KV blocks that others may read. Block b of group g lies at ``group_offsets[g] + b * its bytes``."""

    worker_id: str
    epoch: int  # a new one per incarnation of the worker: a ticket of another epoch is refused
    layout: KVLayout
    num_blocks: int
    group_offsets: tuple[int, ...]
    address: str  # host:port of the worker's direct channel, always there: control, and bytes when nothing better
    model_identity: str  # content of the checkpoint
    shared_memory: SharedMemoryRef | None = None
    draft_identity: str = ""  # content of a draft that keeps something in the blocks

    def difference(self, other: KVRegion) -> str | None:
        """None when blocks of one mean the same in the other, else what differs, with both values."""
        if (difference := self.layout.difference(other.layout)) is not None:
            return difference
        if self.model_identity != other.model_identity:
            return f"model {self.model_identity} here, {other.model_identity} there"
        if self.draft_identity != other.draft_identity:
            return f"draft {self.draft_identity or 'none'} here, {other.draft_identity or 'none'} there"
        return None


def local_host_id() -> str:
    """The boot id of this machine: the same for all its processes and containers, different for any other machine."""
    try:
        return _BOOT_ID_PATH.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
