"""Fingerprints of blocks by the native library, also while they are copied. The twin, in Python, is
``kv_transfer.fingerprint``: both compute XXH3 with 128 bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np

from eagleray.kernels.native.library import NativeLibrary

MIN_BYTES: Final = 241  # of prefix and block together: shorter inputs take other ways through the algorithm
_DIGEST_BYTES: Final = 16


def fingerprint(library: NativeLibrary, prefix: str, views: Sequence[memoryview]) -> bytes:
    """16 bytes over ``prefix`` and ``views``. Raises ``ValueError`` if these are fewer than ``MIN_BYTES``."""
    return _fingerprint(library, prefix, views, None)


def copy_block(
    library: NativeLibrary, prefix: str, origins: Sequence[memoryview], targets: Sequence[memoryview]
) -> bytes:
    """Copy each origin to its target; returns the fingerprint of what has been copied. Raises ``ValueError`` if their
    sizes differ, or if there are fewer than ``MIN_BYTES``."""
    sizes, target_sizes = [origin.nbytes for origin in origins], [target.nbytes for target in targets]
    if sizes != target_sizes:
        raise ValueError(f"blocks of {sizes} bytes cannot be copied to {target_sizes}")
    if any(target.readonly for target in targets):
        raise ValueError("the target is read-only")
    return _fingerprint(library, prefix, origins, _addresses(targets))


def _fingerprint(
    library: NativeLibrary, prefix: str, views: Sequence[memoryview], targets: ctypes.Array[ctypes.c_void_p] | None
) -> bytes:
    head, sizes = prefix.encode(), [view.nbytes for view in views]
    digest = ctypes.create_string_buffer(_DIGEST_BYTES)
    status = library.fingerprint(
        head, len(head), _addresses(views), targets, (ctypes.c_int64 * len(sizes))(*sizes), len(sizes), digest
    )
    if status != 0:
        raise ValueError(f"a block of {sum(sizes)} bytes is too short: {MIN_BYTES} with its prefix are needed")
    return digest.raw


def _addresses(views: Sequence[memoryview]) -> ctypes.Array[ctypes.c_void_p]:
    """Where contiguous views lie. They must outlive the use of it."""
    return (ctypes.c_void_p * len(views))(*(np.frombuffer(view, np.uint8).ctypes.data for view in views))
