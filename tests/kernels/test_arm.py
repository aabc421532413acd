"""The portable level on an emulated Arm CPU, held against this one."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from eagleray.kernels.native.build import LEVEL_FLAGS

SOURCES: Final = Path(__file__).resolve().parents[2] / "kernels" / "native"
PROGRAM: Final = Path(__file__).with_name("every_operation.c")
FLAGS: Final = ("-std=gnu11", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-w")
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
DEADLINE_S: Final = 300.0

needs_arm = pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(EMULATOR)),
    reason=f"no {ARM_COMPILER} or {EMULATOR}; in Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static",
)


def results(compiler: str, flags: Sequence[str], program: Path, emulator: Sequence[str] = ()) -> dict[str, list[str]]:
    """What ``every_operation`` prints when compiled so: by operation and detail."""
    sources = [str(PROGRAM), *map(str, sorted(SOURCES.glob("*.c")))]
    command = [compiler, *FLAGS, *flags, f"-I{SOURCES}", *sources, "-o", str(program), "-lm"]
    subprocess.run(command, check=True, timeout=DEADLINE_S, capture_output=True)
    ended = subprocess.run([*emulator, str(program)], check=True, timeout=DEADLINE_S, capture_output=True, text=True)
    lines = [line.split() for line in ended.stdout.splitlines()]
    return {f"{operation} {detail}": figures for operation, detail, *figures in lines}


@pytest.mark.slow
@needs_arm
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with AVX2")
def test_arm_computes_what_avx2_does(tmp_path: Path) -> None:
    on_arm = results(ARM_COMPILER, ("-static",), tmp_path / "arm", (EMULATOR,))
    here = results("cc", LEVEL_FLAGS["avx2"], tmp_path / "here")
    assert on_arm.keys() == here.keys() and len(here) > 15
    for operation, figures in here.items():
        if len(figures) == 1:  # a hash
            assert on_arm[operation] == figures, operation
        else:
            (sum_here, magnitude), (sum_on_arm, _) = map(float, figures), map(float, on_arm[operation])
            assert sum_on_arm == pytest.approx(sum_here, abs=1e-4 * magnitude), operation
