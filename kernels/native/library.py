"""The native library as Python functions. What each does, and what it takes, is said in the C file that defines it."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from eagleray.kernels.native.build import TILE_LEVEL, FolderRefused, NativeUnavailable, build_library, request_tiles

ELEMENTS: Final = {torch.float32: 0, torch.bfloat16: 1}  # enum element in vectors.h
MAX_HEAD_DIM: Final = 256  # in attention.c
MAX_ARGUMENTS: Final = 25  # in program.c

# Of the dynamic loader, for files that are sound: a folder mounted noexec, rights, a security policy. Building the
# library again would change nothing.
_REFUSALS: Final = ("failed to map segment", "Permission denied", "Operation not permitted")

_logger: Final = logging.getLogger(__name__)
_ADDRESS, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS: Final = {
    "panel_columns": (),
    "pack_weight": (_ADDRESS, _LONG, _LONG, _INT, _ADDRESS),
    "linear": (_ADDRESS, _LONG, _ADDRESS, _INT, _ADDRESS, _ADDRESS, _ADDRESS, _LONG, _LONG, _LONG, _INT),
    "pack_panels": (_ADDRESS, _LONG, _LONG, _LONG, _ADDRESS, _INT),
    "panel_linear": (
        *(_ADDRESS, _LONG, _INT, _ADDRESS, _INT, _ADDRESS, _LONG, _ADDRESS),
        *(_ADDRESS, _ADDRESS, _LONG, _ADDRESS, _LONG, _INT, _LONG, _LONG, _LONG, _LONG, _INT),
    ),
    "rms_norm": (_ADDRESS, _LONG, _ADDRESS, _FLOAT, _ADDRESS, _LONG, _LONG, _LONG, _INT, _INT),
    "silu_and_multiply": (_ADDRESS, _LONG, _ADDRESS, _LONG, _LONG, _LONG, _INT, _INT),
    "join_columns": (_ADDRESS, _LONG, _LONG, _ADDRESS, _LONG, _LONG, _ADDRESS, _LONG),
    "gather_rows": (_ADDRESS, _INT, _LONG, _ADDRESS, _ADDRESS, _INT, _LONG, _LONG),
    "pass_features": (*[_ADDRESS] * 4, _INT, _LONG, _ADDRESS, _LONG, _LONG, _INT),
    "rotary_angles": (_ADDRESS, _LONG, _ADDRESS, _FLOAT, _ADDRESS, _ADDRESS, _LONG, _LONG, _INT),
    "rotate_and_store": (_ADDRESS, _LONG, _ADDRESS, _ADDRESS, _FLOAT, *[_ADDRESS] * 4, *[_LONG] * 7, *[_INT] * 3),
    "paged_attention": (
        *(_ADDRESS, _LONG, _LONG, _ADDRESS, _LONG, _LONG, _ADDRESS, _LONG, _LONG),
        *[_ADDRESS] * 6,
        *(*[_LONG] * 6, _FLOAT, _INT, _INT, _INT),
    ),
    "argmax_rows": (_ADDRESS, _LONG, _ADDRESS, _LONG, _LONG, _INT),
    "sample_rows": (_ADDRESS, *[_LONG] * 3, *[_ADDRESS] * 3, _LONG, _INT),
    "guess_rows": (_ADDRESS, _LONG, *[_ADDRESS] * 6, _LONG, _LONG, _INT),
    "copy_blocks": (*[_ADDRESS] * 4, _LONG, _LONG, _INT),
    "fingerprint": (_ADDRESS, _LONG, *[_ADDRESS] * 3, _LONG, _ADDRESS),
    "run_program": (_ADDRESS, _LONG, _ADDRESS, _LONG, _ADDRESS),
}
_RESULTS: Final = {
    "panel_columns": _LONG,
    "panel_linear": _INT,
    "gather_rows": _INT,
    "pass_features": _INT,
    "rotate_and_store": _INT,
    "paged_attention": _INT,
    "sample_rows": _INT,
    "fingerprint": _INT,
    "run_program": _INT,
}


@dataclass(frozen=True, slots=True)
class NativeFunction:
    """A function of a C file. While the library's tape records, its calls are noted."""

    function: Callable[..., Any]
    argument_types: Sequence[type[Any]]
    replay_address: int | None  # of the function in program.c that calls this one; None: it cannot be replayed
    tape: Tape

    def __call__(self, *arguments: Any) -> Any:
        if self.tape.calls is not None:
            self.tape.calls.append(NativeCall(self, arguments))
        return self.function(*arguments)


@dataclass(frozen=True, slots=True)
class NativeCall:
    """A call that was recorded."""

    function: NativeFunction
    arguments: tuple[Any, ...]


class Tape(threading.local):
    """The calls of one thread, while it records."""

    calls: list[NativeCall] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[NativeCall]]:
        """What is called meanwhile, in order."""
        calls: list[NativeCall] = []
        self.calls = calls
        try:
            yield calls
        finally:
            self.calls = None


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The functions of the C files, by the same names. They release the interpreter's lock."""

    level: str
    num_threads: int  # 1 without OpenMP
    has_openmp: bool  # its compiler had it
    build: str  # names the sources and options that it was compiled from
    panel_columns: Callable[..., int]
    pack_weight: Callable[..., None]
    linear: Callable[..., None]
    pack_panels: Callable[..., None]
    panel_linear: Callable[..., int]
    rms_norm: Callable[..., None]
    silu_and_multiply: Callable[..., None]
    join_columns: Callable[..., None]
    gather_rows: Callable[..., int]
    pass_features: Callable[..., int]
    rotary_angles: Callable[..., None]
    rotate_and_store: Callable[..., int]
    paged_attention: Callable[..., int]
    argmax_rows: Callable[..., None]
    sample_rows: Callable[..., int]
    guess_rows: Callable[..., None]
    copy_blocks: Callable[..., None]
    fingerprint: Callable[..., int]
    run_program: Callable[..., int]
    tape: Tape
    lost: str | None  # a better level that could not be had, and why


def load_library(level: str, cache_folder: Path, num_threads: int) -> NativeLibrary:
    """Compile if necessary and load. Raises ``NativeUnavailable``."""
    if level == TILE_LEVEL and not request_tiles():
        raise NativeUnavailable("the operating system does not grant the state of AMX tiles to this process")
    path = build_library(level, cache_folder)
    try:
        return open_library(level, path, num_threads)
    except OSError as error:
        if any(reason in str(error) for reason in _REFUSALS):
            way_out = "set XDG_CACHE_HOME to a folder whose programs may be executed"
            raise FolderRefused(f"the system does not run libraries in {cache_folder}: {error}; {way_out}") from None
        _logger.warning("the library for %s is damaged and is built again: %s", level, error)
    try:
        path.unlink(missing_ok=True)
        return open_library(level, build_library(level, cache_folder), num_threads)
    except OSError as error:
        raise NativeUnavailable(f"cannot load {path}, which was just built again: {error}") from None


def open_library(level: str, path: Path, num_threads: int) -> NativeLibrary:
    """The library at ``path``, which was compiled for ``level``. Raises ``OSError`` if it is none."""
    library = ctypes.CDLL(str(path))
    has_openmp = bool(library.computes_in_threads())
    if not has_openmp:
        num_threads = 1
    tape = Tape()
    functions = {name: _bind(library, name, arguments, tape) for name, arguments in _ARGUMENTS.items()}
    return NativeLibrary(level, num_threads, has_openmp, path.stem, **functions, tape=tape, lost=None)


def _bind(library: ctypes.CDLL, name: str, argument_types: Sequence[type[Any]], tape: Tape) -> NativeFunction:
    function = getattr(library, name)
    function.argtypes = argument_types
    function.restype = _RESULTS.get(name)
    replaying = getattr(library, f"replay_{name}", None)
    replay_address = None if replaying is None else ctypes.cast(replaying, _ADDRESS).value
    return NativeFunction(function, argument_types, replay_address, tape)


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
