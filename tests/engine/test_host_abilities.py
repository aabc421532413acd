from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eagleray.core.clock import SystemClock
from eagleray.core.config import EngineConfig, ModelConfigSection
from eagleray.core.errors import ConfigError
from eagleray.engine.execution import executor
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.execution.host_abilities import HostAbilities, read_host_abilities
from eagleray.engine.execution.weight_memory import LinearBytes, packed_bytes
from eagleray.kernels.native import build
from eagleray.kernels.native.build import build_library, library_path, supported_levels
from eagleray.kernels.select import select_kernels
from eagleray.models.loader import load_model
from eagleray.models.packed_weights import PackedWeightFiles
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

CHECKPOINT = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def test_native_kernels_need_a_compiler_or_what_one_has_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = shutil.which("cc")
    if compiler is not None:
        assert read_host_abilities().has_native_kernels
        build_library(supported_levels()[-1], tmp_path / "eagleray" / "kernels")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_host_abilities().has_native_kernels == (compiler is not None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert not read_host_abilities().has_native_kernels


def test_a_folder_that_cannot_be_made_has_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there" / "yet"))
    assert read_host_abilities().packed_room_bytes > 0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    abilities = read_host_abilities()
    assert abilities.packed_room_bytes == 0
    assert not abilities.has_native_kernels


def test_a_cache_folder_that_cannot_be_looked_into_has_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hidden, stat = tmp_path / "hidden", Path.stat

    def refuse(path: Path, **options: Any) -> Any:
        if hidden in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    hidden.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(hidden / "cache"))
    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: path != hidden)
    assert read_host_abilities() == HostAbilities(has_native_kernels=False, packed_room_bytes=0)


def test_a_user_without_a_home_folder_has_no_cache_and_computes_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert read_host_abilities() == HostAbilities(has_native_kernels=False, packed_room_bytes=0)
    description = select_kernels("auto", torch.float32, "cpu", 1).description
    assert description == "torch (this user has no home folder; set XDG_CACHE_HOME)"
    assert executor._packed_weight_files(ModelConfigSection(), "model") is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a CPU of one level")
def test_a_library_that_this_cpu_cannot_run_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = library_path("avx2", tmp_path / "eagleray" / "kernels")
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    (tmp_path / "cpuinfo").write_text("flags : sse2\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "_CPU_INFO", tmp_path / "cpuinfo")
    assert not read_host_abilities().has_native_kernels
    (tmp_path / "cpuinfo").write_text("flags : sse2 avx2 fma\n")
    assert read_host_abilities().has_native_kernels


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("quantization", [None, "w8a8", "int8", "int4"])
def test_the_file_of_a_model_is_found_to_be_its_own(tmp_path: Path, choice: Any, quantization: Any) -> None:
    kernels = select_kernels(choice, torch.bfloat16, "cpu", 1, quantization=quantization)
    if kernels.linear_format is None or kernels.linear_format.layout is None:
        pytest.skip("torch computes from weights as they are, or in an order of this process's own: there is no file")
    save_random_checkpoint(tmp_path, CHECKPOINT, seed=0)
    model, folder = load_model_config(tmp_path), tmp_path / "cache" / "eagleray" / "packed_weights"
    files = PackedWeightFiles(folder, "model", 2**40, SystemClock())
    load_model(tmp_path, model, torch.bfloat16, "cpu", kernels=kernels, packed_files=files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        patch.setattr(shutil, "disk_usage", lambda folder: type("Full", (), {"free": 0}))
        abilities = read_host_abilities()
    num_bytes = packed_bytes(model, "bfloat16", LinearBytes(kernels.is_native, quantization))
    assert abilities.can_keep(num_bytes, 2**40)
    assert not abilities.can_keep(2 * num_bytes, 2**40)
    assert not abilities.can_keep(num_bytes, 0)


def test_asking_does_not_import_torch() -> None:
    script = (
        "import sys; from eagleray.engine.execution.host_abilities import read_host_abilities;"
        "read_host_abilities(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_that_do_not_fit_where_torch_computes_are_refused_before_they_are_loaded(
    monkeypatch: pytest.MonkeyPatch, quantization: Any
) -> None:
    monkeypatch.setattr(executor, "available_host_bytes", lambda: 1000)
    model = ModelConfigSection(quantization=quantization)
    with pytest.raises(ConfigError, match="1000B are free; install a C compiler, or take a smaller model"):
        build_executor(model, EngineConfig(kernels="torch", num_blocks=8), num_threads=1)
