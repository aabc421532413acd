from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from eagleray.kernels import select
from eagleray.kernels.cache_folder import user_cache_folder
from eagleray.kernels.linear.quantization import QuantizationUnsupported
from eagleray.kernels.native import build, library
from eagleray.kernels.native.build import NativeUnavailable, build_library, supported_levels
from eagleray.kernels.native.library import load_library
from eagleray.kernels.select import TORCH_KERNELS, KernelChoice, select_kernels

LEVEL = "portable" if "portable" in supported_levels() else supported_levels()[0]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def write_compiler(folder: Path, script: str) -> Path:
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return compiler


def only_compiler(monkeypatch: pytest.MonkeyPatch, compiler: Path | None) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: str(compiler) if compiler and name == "cc" else None)


def test_without_a_compiler_torch_serves_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_compiler(monkeypatch, None)
    kernels = select_kernels("auto", torch.float32, "cpu", 1, tmp_path)
    assert kernels.linear_format is None
    assert kernels.description.startswith("torch (no C compiler")
    with pytest.raises(NativeUnavailable, match="no C compiler"):
        select_kernels("native", torch.float32, "cpu", 1, tmp_path)


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_compiler(monkeypatch, write_compiler(tmp_path, "echo 'x.c:1: error: no such thing' >&2; exit 1"))
    with pytest.raises(NativeUnavailable, match="error: no such thing"):
        build_library(LEVEL, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def compiler_without_openmp(tmp_path: Path) -> Path:
    script = f'case "$*" in *-fopenmp*) exit 1;; esac; exec {shutil.which("cc")} "$@"'
    return write_compiler(tmp_path, script)


@needs_compiler
def test_a_compiler_without_openmp_builds_for_one_thread_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler_without_openmp: Path
) -> None:
    only_compiler(monkeypatch, compiler_without_openmp)
    loaded = load_library(LEVEL, tmp_path / "cache", num_threads=2)
    assert loaded.panel_columns() > 0
    assert loaded.num_threads == 1
    assert "threads: 1, built without OpenMP" in select.native_kernels(loaded, torch.float32).description


@needs_compiler
def test_when_openmp_comes_later_the_library_for_one_thread_is_not_taken_any_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler_without_openmp: Path
) -> None:
    found, folder = Path(str(shutil.which("cc"))), tmp_path / "cache"
    only_compiler(monkeypatch, compiler_without_openmp)
    of_one_thread = build_library(LEVEL, folder)
    built_ns = of_one_thread.stat().st_mtime_ns
    assert build_library(LEVEL, folder) == of_one_thread and of_one_thread.stat().st_mtime_ns == built_ns
    only_compiler(monkeypatch, None)
    assert build_library(LEVEL, folder) == of_one_thread, "no compiler is better than none and no library"
    assert build.can_be_built(folder)
    only_compiler(monkeypatch, found)
    assert load_library(LEVEL, folder, num_threads=2).num_threads == 2


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of two small sources, in the place of ours."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("a.c", "a.h"):
        (folder / name).write_text("int one;\n")
    monkeypatch.setattr(build, "_SOURCE_FOLDER", folder)
    return folder


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda folder: (folder / "a.c").write_text("int two;\n"), True),
        (lambda folder: (folder / "a.h").write_text("int two;\n"), True),
        (lambda folder: (folder / "b.h").write_text(""), True),
        (lambda folder: (folder / "a.h").rename(folder / "b.h"), True),
        (lambda folder: (folder / "a.h").unlink(), True),
        (lambda folder: os.utime(folder / "a.c", (1, 1)), False),
        (lambda folder: (folder / "notes.txt").write_text(""), False),
    ],
    ids=["code", "header", "one more", "another name", "one less", "another time", "no source"],
)
def test_a_library_has_another_name_when_any_source_has_changed(
    sources: Path, tmp_path: Path, change: Callable[[Path], object], is_another: bool
) -> None:
    before = build.library_path(LEVEL, tmp_path)
    change(sources)
    assert (build.library_path(LEVEL, tmp_path) != before) == is_another


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (build, "_FLAGS", (*build._FLAGS, "-g")),
        (build, "LEVEL_FLAGS", {**build.LEVEL_FLAGS, LEVEL: (*build.LEVEL_FLAGS[LEVEL], "-mavx")}),
        (build.platform, "machine", lambda: "another"),
    ],
    ids=["flags of all", "flags of its level", "CPU"],
)
def test_a_library_has_another_name_when_it_is_compiled_otherwise_or_for_another_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: object, name: str, value: object
) -> None:
    before = build.library_path(LEVEL, tmp_path)
    monkeypatch.setattr(owner, name, value)
    assert build.library_path(LEVEL, tmp_path) != before


def test_no_two_levels_share_a_fingerprint(tmp_path: Path) -> None:
    names = [build.library_path(level, tmp_path).name for level in build.LEVEL_FLAGS]
    assert len({name.partition("-")[0] for name in names}) == len(build.LEVEL_FLAGS)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeUnavailable, match=r"cannot write to .*file/cache"):
        build_library(LEVEL, tmp_path / "file" / "cache")


@needs_compiler
def test_is_compiled_once_even_when_several_begin_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(3) as threads:
        paths = set(threads.map(lambda _: build_library(LEVEL, tmp_path), range(3)))
    assert list(tmp_path.iterdir()) == list(paths)
    only_compiler(monkeypatch, None)
    assert {build_library(LEVEL, tmp_path)} == paths


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF"])
def test_a_damaged_library_is_built_again_and_its_level_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    build.library_path(LEVEL, tmp_path).write_bytes(damage)
    assert load_library(LEVEL, tmp_path, num_threads=1).panel_columns() > 0
    assert f"the library for {LEVEL} is damaged" in caplog.text


def test_a_library_that_is_damaged_again_is_not_built_a_third_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"'
    only_compiler(monkeypatch, write_compiler(tmp_path, script))
    with pytest.raises(NativeUnavailable, match="which was just built again"):
        load_library(LEVEL, tmp_path / "cache", num_threads=1)


@pytest.mark.parametrize(
    "reason", ["failed to map segment from shared object", "cannot open shared object file: Permission denied"]
)
def test_a_folder_whose_libraries_are_not_run_is_named_and_nothing_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str
) -> None:
    def refuse(level: str, path: Path, num_threads: int) -> None:
        raise OSError(f"{path}: {reason}")

    best = supported_levels()[0]
    build.library_path(best, tmp_path).write_bytes(b"sound")
    monkeypatch.setattr(library, "open_library", refuse)
    description = select_kernels("auto", torch.float32, "cpu", 1, tmp_path).description
    assert description.startswith(f"torch (the system does not run libraries in {tmp_path}: ")
    assert description.endswith("set XDG_CACHE_HOME to a folder whose programs may be executed)")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"sound"]


@needs_compiler
@pytest.mark.skipif(len(supported_levels()) < 2, reason="this machine has one level")
def test_a_level_that_could_not_be_had_is_named_beside_the_one_that_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(select, "supported_levels", lambda: ("best", LEVEL))
    monkeypatch.setitem(build.LEVEL_FLAGS, "best", ("-mno-such-level",))
    description = select_kernels("auto", torch.float32, "cpu", 1, tmp_path).description
    assert description.startswith(f"native ({LEVEL}")
    assert "(not best: " in description and "no-such-level" in description


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_every_compiler_builds_the_best_level(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str) -> None:
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"no {compiler}")
    only_compiler(monkeypatch, Path(found))
    assert load_library(supported_levels()[0], tmp_path, num_threads=1).panel_columns() > 0


@pytest.mark.parametrize(("dtype", "device"), [(torch.float16, "cpu"), (torch.float32, "cuda")])
def test_what_the_library_cannot_compute_falls_to_torch(dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    assert select_kernels("auto", dtype, device, 1, tmp_path).description.startswith("torch (the native library")


def test_torch_can_be_chosen(tmp_path: Path) -> None:
    assert select_kernels("torch", torch.float32, "cpu", 1, tmp_path) == TORCH_KERNELS


def test_the_cache_folder_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / "eagleray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_folder() == Path.home() / ".cache" / "eagleray"


def test_a_level_whose_state_is_not_granted_is_neither_offered_nor_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "request_tiles", lambda: False)
    assert build.TILE_LEVEL not in supported_levels()
    monkeypatch.setattr(library, "request_tiles", lambda: False)
    with pytest.raises(NativeUnavailable, match="does not grant the state of AMX tiles"):
        load_library(build.TILE_LEVEL, tmp_path, 1)


def test_quantisation_is_refused_in_a_dtype_that_has_no_kernel_for_it(tmp_path: Path) -> None:
    with pytest.raises(QuantizationUnsupported, match="int8 needs float32 or bfloat16 on a CPU"):
        select_kernels("torch", torch.float16, "cpu", 1, tmp_path, "int8")


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_the_description_names_the_quantisation(choice: KernelChoice, tmp_path: Path) -> None:
    kernels = select_kernels(choice, torch.bfloat16, "cpu", 1, tmp_path, "w8a8")
    assert kernels.description.endswith("linear layers: w8a8")
    assert kernels.head_format is not None and "int8" in str(kernels.head_format.layout)
