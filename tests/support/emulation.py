"""Levels of the native kernels that this CPU lacks, with their instructions in plain C: see ``emulated_x86.h``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from eagleray.kernels.native.build import LEVEL_FLAGS, NativeUnavailable, supported_levels
from eagleray.kernels.native.library import NativeLibrary, open_library

SOURCES: Final = Path(__file__).resolve().parents[2] / "kernels" / "native"
HEADER: Final = Path(__file__).with_name("emulated_x86.h")
FLAGS: Final = (
    "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-w", *LEVEL_FLAGS["avx2"],
    "-O1", "-fexpensive-optimizations",  # the second, or gcc does not fuse products with sums
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
DEADLINE_S: Final = 300.0


def emulated_levels() -> tuple[str, ...]:
    """None unless the CPU has AVX2, which the header is written for."""
    supported = supported_levels()
    return tuple(level for level in LEVEL_FLAGS if level not in supported) if "avx2" in supported else ()


def load_emulated(level: str, folder: Path, num_threads: int) -> NativeLibrary:
    """Compile unless ``folder`` has it and load. Raises ``NativeUnavailable``."""
    library = folder / f"emulated-{level}.so"
    if not library.exists():
        if not shutil.which("gcc"):
            raise NativeUnavailable(f"no gcc, which {level} is emulated with")
        # Not by -D: immintrin.h, which the header includes, would believe it.
        settings = folder / f"emulated-{level}.h"
        extensions = [flag[2:] for flag in LEVEL_FLAGS[level] if flag.startswith(("-mavx512", "-mamx"))]
        macros = [f"#define __{name.upper().replace('-', '_')}__ 1\n" for name in extensions]
        settings.write_text(f'#include "{HEADER}"\n{"".join(macros)}')
        sources = map(str, sorted(SOURCES.glob("*.c")))
        command = ["gcc", *FLAGS, "-include", str(settings), *sources, "-o", str(library), "-lm"]
        subprocess.run(command, check=True, timeout=DEADLINE_S)
    return open_library(level, library, num_threads)
