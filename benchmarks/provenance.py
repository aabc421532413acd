"""What a number needs beside it to mean something later: when, on what, with which code."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_REPOSITORY: Final = Path(__file__).resolve().parent.parent
_GIT_TIMEOUT_S: Final = 10


@dataclass(frozen=True)
class Provenance:
    """Of one run; the hardware is that of the program, which is the server's too when its address is local."""

    date: str  # ISO 8601, UTC
    command: str
    git_commit: str  # with "-dirty" when files differ from it; "unknown" outside a repository
    cpu: str
    num_cores: int
    memory_bytes: int
    python: str


def provenance() -> Provenance:
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        git_commit=_git_commit(),
        cpu=_cpu_model(),
        num_cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
    )


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_model() -> str:
    """As Linux tells it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
