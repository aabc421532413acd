"""Transports by the names that people write into the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eagleray.core.errors import ConfigError
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, BlockOps
from eagleray.kv_transfer.transport import BlockStore, Transport
from eagleray.kv_transfer.transports.loopback import LoopbackTransport
from eagleray.kv_transfer.transports.shared_memory import SharedMemoryTransport
from eagleray.kv_transfer.transports.tcp import TcpTransport


def make_transports(
    names: Sequence[str], stores: Mapping[str, BlockStore], ops: BlockOps = PORTABLE_BLOCK_OPS
) -> list[Transport]:
    """In the order of ``names``. ``stores`` are the pools of this process, which only loopback reads.

    Raises ``ConfigError`` naming one that does not exist.
    """
    transports: list[Transport] = []
    for name in names:
        if name == "shared_memory":
            transports.append(SharedMemoryTransport(ops))
        elif name == "tcp":
            transports.append(TcpTransport(ops))
        elif name == "loopback":
            transports.append(LoopbackTransport(stores, ops=ops))
        else:
            raise ConfigError("transfer.transports", name, "choose of shared_memory, tcp and loopback")
    return transports
