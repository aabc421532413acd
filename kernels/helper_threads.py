"""The OpenMP threads that help a thread to compute."""

from __future__ import annotations

import ctypes
from typing import Final

_SOFT: Final = 1  # omp_pause_soft of OpenMP 5: what the program has set stays


def end_helper_threads() -> None:
    """End the helpers of the calling thread; its next operation starts new ones. Otherwise they wait awake for that
    operation, each on a core, for up to 20 ms: too long where somebody else is to have the cores now.

    Does nothing where no OpenMP is loaded, or one from before OpenMP 5.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)
