"""Compiling the native kernels: once per machine and source, by its own C compiler, in a few seconds."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from eagleray.kernels.cache_folder import can_be_written, is_there

_SOURCE_FOLDER: Final = Path(__file__).resolve().parent
_COMPILERS: Final = ("cc", "gcc", "clang")
_FLAGS: Final = (
    "-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=default",
    "-ffp-contract=fast",  # a product and a sum in one rounding, on every CPU that can
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_OPENMP: Final = "-fopenmp"
_COMPILE_DEADLINE_S: Final = 120.0

_AVX512: Final = (
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512",
)  # fmt: skip
_AVX512_VNNI: Final = (*_AVX512, "-mavx512vnni")
_AVX512_BF16: Final = (*_AVX512_VNNI, "-mavx512bf16")
TILE_LEVEL: Final = "amx"

# What the compiler may use, by level, best first.
LEVEL_FLAGS: Final = {
    TILE_LEVEL: (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": _AVX512_BF16,
    "avx512_vnni": _AVX512_VNNI,
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
BFLOAT16_LEVELS: Final = (TILE_LEVEL, "avx512_bf16")  # that multiply pairs of it
# What of them the CPU must name, beyond what torch found it and the operating system to support.
_CPU_FEATURES: Final = {
    TILE_LEVEL: {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni"},
    "avx512_vnni": {"avx512_vnni"},
}
# And what torch looks for.
_BASE_FEATURES: Final = {
    "AVX512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "AVX2": {"avx2", "fma"},
}
_CPU_INFO: Final = Path("/proc/cpuinfo")
_SYS_ARCH_PRCTL: Final = 158  # of Linux on x86-64, as are the next two
_ARCH_REQ_XCOMP_PERM: Final = 0x1023
_XFEATURE_XTILEDATA: Final = 18


class NativeUnavailable(Exception):
    """There is no native library, for the reason that the message gives."""


class FolderRefused(NativeUnavailable):
    """Nor can there be one of another level: the system does not run what lies in the folder of libraries."""


def supported_levels() -> tuple[str, ...]:
    """The levels that this machine can run, best first."""
    import torch  # takes seconds: not for those who only ask whether there is a compiler

    return _levels(torch.backends.cpu.get_cpu_capability(), _cpu_features())


def _named_levels() -> tuple[str, ...]:
    """``supported_levels``, as Linux names what the CPU has. No torch."""
    features = _cpu_features()
    return _levels(next((name for name, needed in _BASE_FEATURES.items() if needed <= features), ""), features)


def _levels(capability: str, features: set[str]) -> tuple[str, ...]:
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return ("portable",)
    levels = tuple(LEVEL_FLAGS)
    levels = levels[{"AVX512": 0, "AVX2": levels.index("avx2")}.get(capability, -1) :]
    return tuple(
        level
        for level in levels
        if _CPU_FEATURES.get(level, set()) <= features and (level != TILE_LEVEL or request_tiles())
    )


def request_tiles() -> bool:
    """Ask Linux for the state of AMX tiles, which it gives to processes that ask only; whether it was granted."""
    if platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def _cpu_features() -> set[str]:
    """As Linux names them; none elsewhere."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def build_library(level: str, cache_folder: Path) -> Path:
    """The library for ``level``, compiled unless ``cache_folder`` has it already. One that was compiled without OpenMP
    serves as long as the compiler has none.

    Several processes may do so at once: each compiles into a file of its own and renames it.

    Raises:
        NativeUnavailable: no compiler, it failed, or the folder cannot be written to.
    """
    sources, library = _sources(), library_path(level, cache_folder)
    if is_there(library):
        return library
    compiler, of_one_thread = _find_compiler(), library_path(level, cache_folder, has_openmp=False)
    if is_there(of_one_thread) and (compiler is None or not _has_openmp(compiler)):
        return of_one_thread
    if compiler is None:
        raise NativeUnavailable(f"no C compiler ({', '.join(_COMPILERS)}) on this machine; install one, such as gcc")
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=cache_folder)
        os.close(handle)
        temporary = Path(name)
        try:
            if not _compile(compiler, [file for file in sources if file.suffix == ".c"], level, temporary):
                library = of_one_thread
            temporary.chmod(0o755)
            with temporary.open("rb") as file:  # or a machine that loses power may keep the new name and lose the bytes
                os.fsync(file.fileno())
            temporary.rename(library)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        way_out = "set XDG_CACHE_HOME to a folder that can be written to"
        raise NativeUnavailable(f"cannot write to {cache_folder}: {error.strerror}; {way_out}") from None
    return library


def can_be_built(cache_folder: Path) -> bool:
    """Whether there is a compiler and room for what it makes, or a library that this CPU can run. No torch."""
    kinds = itertools.product(_named_levels(), (True, False))
    if any(is_there(library_path(level, cache_folder, has_openmp)) for level, has_openmp in kinds):
        return True
    return _find_compiler() is not None and can_be_written(cache_folder)


def library_path(level: str, cache_folder: Path, has_openmp: bool = True) -> Path:
    """Without OpenMP it has a name of its own, or it would be taken for the other one when there is OpenMP at last."""
    kind = "" if has_openmp else "-one-thread"
    return cache_folder / f"{_fingerprint(_sources(), level)}-{level}{kind}.so"


def _sources() -> list[Path]:
    return sorted(_SOURCE_FOLDER.glob("*.[ch]"))


def _find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def _has_openmp(compiler: str) -> bool:
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "any.c"
            source.write_text("int main(void) {\n#pragma omp parallel\n    {}\n    return 0;\n}\n", encoding="ascii")
            command = [compiler, _OPENMP, str(source), "-o", str(source.with_suffix(""))]
            done = subprocess.run(command, capture_output=True, timeout=_COMPILE_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _fingerprint(sources: Sequence[Path], level: str) -> str:
    digest = hashlib.sha256(repr((platform.machine(), _FLAGS, LEVEL_FLAGS[level])).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: Sequence[Path], level: str, target: Path) -> bool:
    """Whether it is with OpenMP, which it is if the compiler has it; without, the kernels use one thread."""
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
            return bool(options)
        errors = errors or done.stderr
    first_error = next((line for line in errors.splitlines() if "error" in line), errors[:200])
    raise NativeUnavailable(f"{compiler} failed: {first_error}")
