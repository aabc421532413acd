"""Which engines are compared: the Python each lives in, its driver, what it reads, and the settings it runs with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_DRIVERS: Final = Path(__file__).resolve().parent / "peers"
_EXPORT_TIMEOUT_S: Final = 1800


@dataclass(frozen=True, eq=False)  # each is one of a kind, and a key of dictionaries
class Contender:
    """One row of the comparison."""

    name: str
    engine: str  # its driver is peers/run_<engine>.py
    bytes_per_weight: float = 2.0
    export: str | None = None  # weight format of the OpenVINO export it reads; None: the checkpoint
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def driver(self) -> Path:
        return _DRIVERS / f"run_{self.engine}.py"

    def arguments(self, model: Path, limits: Mapping[str, int]) -> dict[str, str]:
        """Of its driver; ``limits`` are those options that all drivers share."""
        shared = {option: str(value) for option, value in limits.items()}
        return {"--model": str(model), "--settings": json.dumps(self.settings), **shared}


# OpenVINO's defaults on a CPU keep K and V in 8 bits; the rows that end in "-kv16" keep them as the others do.
_KV16: Final = {"KV_CACHE_PRECISION": "bf16"}
CONTENDERS: Final = (
    Contender("eagleray-bf16", "eagleray"),
    Contender("eagleray-int8", "eagleray", 1.0, settings={"quantization": "int8"}),
    Contender("eagleray-w8a8", "eagleray", 1.0, settings={"quantization": "w8a8"}),
    Contender("eagleray-int4", "eagleray", 0.5, settings={"quantization": "int4"}),
    Contender("vllm", "vllm"),
    Contender("vllm-eager", "vllm", settings={"enforce_eager": True}),
    Contender("openvino-bf16", "openvino", export="fp16"),
    Contender("openvino-bf16-kv16", "openvino", export="fp16", settings=_KV16),
    Contender("openvino-int8", "openvino", 1.0, export="int8"),
    Contender("openvino-int8-kv16", "openvino", 1.0, export="int8", settings=_KV16),
    Contender("openvino-int4", "openvino", 0.5, export="int4"),
    Contender("transformers", "transformers"),
)


@dataclass(frozen=True)
class Pythons:
    """Interpreters by engine; an engine without one is left out."""

    by_engine: Mapping[str, Path]

    def chosen(self, names: list[str] | None) -> Iterator[Contender]:
        """Those named, in that order, or all whose engine has a Python; of ours without names only ``bf16``."""
        by_name = {contender.name: contender for contender in CONTENDERS}
        for name in names or [c.name for c in CONTENDERS if c.engine != "eagleray" or c.name == "eagleray-bf16"]:
            if by_name[name].engine in self.by_engine:
                yield by_name[name]

    def missing(self) -> list[str]:
        return sorted({contender.engine for contender in CONTENDERS} - self.by_engine.keys())


def default_pythons(**peers: Path | None) -> Pythons:
    """Ours is the one that runs this."""
    return Pythons({"eagleray": Path(sys.executable), **{name: path for name, path in peers.items() if path}})


def model_folder(contender: Contender, checkpoint: Path, python: Path) -> Path:
    """What the contender reads: the checkpoint, or its OpenVINO export beside it, which is made when it is not there.

    Raises ``subprocess.SubprocessError`` when it cannot be made.
    """
    if contender.export is None:
        return checkpoint
    folder = checkpoint.with_name(f"{checkpoint.name}-openvino-{contender.export}")
    if not (folder / "openvino_model.xml").exists():
        print(f"exporting {folder.name}", file=sys.stderr)
        command: list[str | Path] = [python.with_name("optimum-cli"), "export", "openvino", "--model", checkpoint]
        command += ["--task", "text-generation-with-past", "--weight-format", contender.export, folder]
        subprocess.run(command, check=True, timeout=_EXPORT_TIMEOUT_S, stdout=subprocess.DEVNULL)
    return folder


def environment(contender: Contender, python: Path, num_threads: int) -> dict[str, str]:
    """What the engine's documentation asks for, on top of what this process has."""
    values = {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    if contender.engine == "vllm":
        values |= vllm_environment(python)
    return values


def vllm_environment(python: Path) -> dict[str, str]:
    """Its guide for CPUs preloads an allocator (Debian: libtcmalloc-minimal4) and its own Python's Intel OpenMP."""
    libraries = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), python.parent.parent / "lib" / "libiomp5.so"]
    preload = ":".join(str(library) for library in libraries if library.exists())
    return {"LD_PRELOAD": preload, "VLLM_NO_USAGE_STATS": "1"}
