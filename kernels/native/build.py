"""Compiling the native kernels: once per machine and source, by its own C compiler, in a few seconds."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

_SOURCE_FOLDER: Final = Path(__file__).resolve().parent
_COMPILERS: Final = ("cc", "gcc", "clang")
_FLAGS: Final = (
    "-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=default",
    "-ffp-contract=fast",  # a product and a sum in one rounding, on every CPU that can
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_OPENMP: Final = "-fopenmp"
_COMPILE_DEADLINE_S: Final = 120.0

# What the compiler may use, by level; a level is what torch found the CPU and the operating system to support.
_AVX512: Final = (
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512",
)  # fmt: skip
LEVEL_FLAGS: Final = {
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}


# arch_prctl(2): Linux saves the large state of AMX tiles only for processes that ask for it.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


class NativeUnavailable(Exception):
    """There is no native library, for the reason that the message gives."""


def supported_levels() -> tuple[str, ...]:
    """The levels that this machine can run, best first."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return ("portable",)
    capability = torch.backends.cpu.get_cpu_capability()
    first = {"AVX512": "amx" if _amx_is_permitted() else "avx512", "AVX2": "avx2"}.get(capability, "portable")
    levels = tuple(LEVEL_FLAGS)
    return levels[levels.index(first) :]


def _amx_is_permitted() -> bool:
    """Asks for it. The first CPUs with AMX had its bfloat16 and AVX512_BF16 too, and all later ones have."""
    if platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def build_library(level: str, cache_folder: Path) -> Path:
    """The library for ``level``, compiled unless ``cache_folder`` has it already.

    Several processes may do so at once: each compiles into a file of its own and renames it.

    Raises:
        NativeUnavailable: no compiler, it failed, or the folder cannot be written to.
    """
    sources = sorted(_SOURCE_FOLDER.glob("*.[ch]"))
    library = cache_folder / f"{_fingerprint(sources, level)}-{level}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailable(f"no C compiler ({', '.join(_COMPILERS)}) on this machine; install one, such as gcc")
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=cache_folder)
        os.close(handle)
        temporary = Path(name)
        try:
            _compile(compiler, [file for file in sources if file.suffix == ".c"], level, temporary)
            temporary.chmod(0o755)
            temporary.rename(library)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise NativeUnavailable(f"cannot write to {cache_folder}: {error.strerror}") from None
    return library


def _fingerprint(sources: Sequence[Path], level: str) -> str:
    digest = hashlib.sha256(repr((platform.machine(), _FLAGS, LEVEL_FLAGS[level])).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: Sequence[Path], level: str, target: Path) -> None:
    """With OpenMP if the compiler has it; without, the kernels use one thread."""
    command = [compiler, *_FLAGS, *LEVEL_FLAGS[level], *map(str, sources), "-o", str(target), "-lm"]
    errors = ""
    for options in ([_OPENMP], []):
        try:
            done = subprocess.run(
                [*command, *options], capture_output=True, text=True, timeout=_COMPILE_DEADLINE_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise NativeUnavailable(f"{compiler} has not ended within {_COMPILE_DEADLINE_S:.0f} s") from None
        if done.returncode == 0:
            return
        errors = errors or done.stderr
    first_error = next((line for line in errors.splitlines() if "error" in line), errors[:200])
    raise NativeUnavailable(f"{compiler} failed: {first_error}")
