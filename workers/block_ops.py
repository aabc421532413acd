"""Which implementation copies KV blocks and takes their fingerprints."""

from __future__ import annotations

from functools import partial
from typing import Final

from eagleray.core.kv_layout import KVLayout
from eagleray.kernels.kv_ops import fingerprint as native
from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.select import KernelChoice, load_best_library
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, BlockOps

_ONE_THREAD: Final = 1  # a transfer has several, each with a block of its own


def select_block_ops(choice: KernelChoice, layout: KVLayout) -> BlockOps:
    """The fastest that works here for blocks of ``layout``; ``"torch"`` stands for doing without the native library.

    The results are the same, so both ends of a transfer may choose for themselves.
    """
    smallest_bytes = min(group.block_bytes(layout.block_size_tokens) for group in layout.groups)
    if choice == "torch" or smallest_bytes < native.MIN_BYTES:
        return PORTABLE_BLOCK_OPS
    try:
        library = load_best_library(_ONE_THREAD)
    except NativeUnavailable:
        return PORTABLE_BLOCK_OPS
    return BlockOps(partial(native.fingerprint, library), partial(native.copy_block, library))
