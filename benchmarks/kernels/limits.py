"""What the machine can do when nothing holds it up, from a C program of the benchmarks' own."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from eagleray.kernels.native.build import LEVEL_FLAGS, TILE_LEVEL, request_tiles, supported_levels

sys.path.append(str(Path(__file__).resolve().parent.parent))
from interference import undisturbed

_SOURCE: Final = Path(__file__).with_name("limits.c")
_COMPILE_DEADLINE_S: Final = 60.0
_REPEATS: Final = 200_000
_ATTEMPTS: Final = 5
_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@dataclass(frozen=True)
class ProductLimit:
    """Operations per second on operands in the first-level cache: as float32 and int16 where no instruction takes them
    as they are; 0 where none takes those."""

    bfloat16_flop_per_s: float
    int8_op_per_s: float

    def __str__(self) -> str:
        if not self.bfloat16_flop_per_s:
            return "the CPU has neither AVX2 nor more"
        return (
            f"from the first-level cache the units multiply {self.bfloat16_flop_per_s / 1e12:.2f} TFLOP/s in bfloat16 "
            f"and {self.int8_op_per_s / 1e12:.2f} TOP/s in int8 (in float32 and int16 if nothing takes these)"
        )


class Limits:
    """The C functions, compiled anew for every run."""

    def __init__(self, num_threads: int) -> None:
        """Raises ``subprocess.SubprocessError`` when the compiler fails, ``OSError`` when there is none."""
        level = supported_levels()[0]
        if level == TILE_LEVEL:
            request_tiles()
        self._library, self._num_threads = _compiled(LEVEL_FLAGS[level]), num_threads

    def read(self, base: int, offsets: torch.Tensor, piece_bytes: int, together: int) -> None:
        """Pieces of memory from the address ``base``, in the order of ``offsets``; each thread takes ``together``."""
        self._library.read_pieces(base, offsets.data_ptr(), len(offsets), piece_bytes, together, self._num_threads)

    def products(self) -> ProductLimit:
        """The best of several attempts."""
        (in_bfloat16, in_int8), _ = undisturbed(lambda: (self._operations_per_s(0), self._operations_per_s(1)))
        return ProductLimit(in_bfloat16, in_int8)

    def _operations_per_s(self, is_int8: int) -> float:
        rates = []
        for _ in range(_ATTEMPTS):
            start_s = time.perf_counter()
            operations = self._library.multiply_in_cache(is_int8, _REPEATS, self._num_threads)
            rates.append(operations / (time.perf_counter() - start_s))
        return max(rates)


def _compiled(level_flags: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        compiler = shutil.which("cc") or "gcc"
        command = [compiler, "-std=gnu11", "-O3", "-shared", "-fPIC", "-fopenmp", *level_flags]
        subprocess.run([*command, str(_SOURCE), "-o", str(library)], check=True, timeout=_COMPILE_DEADLINE_S)
        loaded = ctypes.CDLL(str(library))  # the file may go once it is mapped
    loaded.read_pieces.argtypes = (_ADDRESS, _ADDRESS, _LONG, _LONG, _LONG, _INT)
    loaded.read_pieces.restype = _LONG
    loaded.multiply_in_cache.argtypes = (_INT, _LONG, _INT)
    loaded.multiply_in_cache.restype = _LONG
    return loaded
