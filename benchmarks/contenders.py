"""Which engines are compared: the Python each lives in, its driver, what it reads, and the settings it runs with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
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
    dtype: str = "bfloat16"  # asked of products; those with weights in 8 bits may be in 8 bits as well, and where a CPU
    # has no instructions for bfloat16 an engine may multiply in float32 what it keeps in bfloat16
    kv: str = "bfloat16"  # what K and V are kept in

    @property
    def driver(self) -> Path:
        return _DRIVERS / f"run_{self.engine}.py"

    def arguments(self, model: Path, limits: Mapping[str, int]) -> dict[str, str]:
        """Of its driver; ``limits`` are those options that all drivers share."""
        shared = {option: str(value) for option, value in limits.items()}
        return {"--model": str(model), "--settings": json.dumps(self.settings), **shared}


_KV16: Final = {"KV_CACHE_PRECISION": "bf16"}
_OPENVINO_F32: Final = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
_KV8: Final = "8 bits"  # OpenVINO's default on a CPU; the rows that end in "-kv16" keep K and V as the others do


def _float32(name: str, engine: str, settings: Mapping[str, Any], export: str | None = None) -> Contender:
    """What the checkpoint knows of a weight are two bytes."""
    return Contender(name, engine, 2.0, export, settings, dtype="float32", kv="float32")


CONTENDERS: Final = (
    Contender("eagleray-bf16", "eagleray"),
    Contender("eagleray-w8a8", "eagleray", 1.0, settings={"quantization": "w8a8"}),
    Contender("eagleray-int8", "eagleray", 1.0, settings={"quantization": "int8"}),
    Contender("eagleray-int4", "eagleray", 0.5, settings={"quantization": "int4"}),
    Contender("vllm", "vllm"),
    Contender("vllm-eager", "vllm", settings={"enforce_eager": True}),
    Contender("openvino-bf16", "openvino", export="fp16", kv=_KV8),
    Contender("openvino-bf16-kv16", "openvino", export="fp16", settings=_KV16),
    Contender("openvino-int8", "openvino", 1.0, export="int8", kv=_KV8),
    Contender("openvino-int8-kv16", "openvino", 1.0, export="int8", settings=_KV16),
    Contender("openvino-int4", "openvino", 0.5, export="int4", kv=_KV8),
    Contender("transformers", "transformers"),
    _float32("eagleray-f32", "eagleray", {"dtype": "float32"}),
    _float32("vllm-f32", "vllm", {"dtype": "float32"}),
    _float32("openvino-f32", "openvino", _OPENVINO_F32, export="fp16"),
    _float32("transformers-f32", "transformers", {"dtype": "float32"}),
)
# As many as 24 GiB hold at once; others are named in pieces of their own.
DEFAULT_ENGINES: Final = (
    "eagleray-bf16", "eagleray-w8a8", "vllm", "openvino-bf16", "openvino-bf16-kv16", "openvino-int8", "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Pythons:
    """Interpreters by engine."""

    by_engine: Mapping[str, Path]

    def chosen(self, names: Collection[str]) -> Iterator[Contender]:
        """Those named, in that order, whose engine has a Python."""
        by_name = {contender.name: contender for contender in CONTENDERS}
        for name in names:
            if by_name[name].engine in self.by_engine:
                yield by_name[name]

    def left_out(self, names: Collection[str]) -> dict[str, str]:
        """Why a contender is not among the chosen ones, for all that are not."""
        reasons = {c.name: f"no --{c.engine}-python was given" for c in CONTENDERS if c.engine not in self.by_engine}
        return {c.name: "not named in --engines" for c in CONTENDERS if c.name not in names} | reasons


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
