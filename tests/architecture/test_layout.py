"""The packages lie at the repository root: what pyproject says of them, what a wheel holds, what others can see."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

_NOT_PACKAGES = {"benchmarks", "build", "deploy", "dist", "docs", "examples", "peers", "scripts", "tests"}


def test_every_folder_with_an_init_file_is_a_listed_package_and_the_other_way_round(source: Any) -> None:
    on_disk = {
        init.parent.relative_to(source.root).as_posix()
        for top in source.root.iterdir()
        if top.is_dir() and not top.name.startswith(".") and top.name not in _NOT_PACKAGES
        for init in top.rglob("__init__.py")
    }
    assert on_disk == set(source.package_folders.values())


def test_every_module_lies_in_a_listed_package(source: Any) -> None:
    folders = set(source.package_folders.values())
    assert [module.path for module in source.library if Path(module.path).parent.as_posix() not in folders] == []


def test_our_kernels_folder_does_not_shadow_the_published_library_of_that_name(source: Any, tmp_path: Path) -> None:
    look_up = (
        "import importlib.util, eagleray.kernels\n"
        "found = importlib.util.find_spec('kernels')\n"
        "print(found.origin if found else '')"
    )
    run = [sys.executable, "-c", look_up]
    origin = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    assert not origin.startswith(str(source.root))


def test_the_kernels_package_defines_no_version_that_transformers_would_take_for_the_published_library(
    source: Any,
) -> None:
    assert "__version__" not in (source.root / "kernels" / "__init__.py").read_text(encoding="utf-8")


def test_constraints_pin_every_direct_dependency_and_name_no_place_to_get_it_from(source: Any) -> None:
    lines = (source.root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)] == []
    extras = source.project["optional-dependencies"]
    required = source.project["dependencies"] + extras["dev"] + extras["local"]
    names = {re.split(r"[\[<>=! ;]", requirement)[0].lower() for requirement in required}
    assert names - {pin.split("==")[0] for pin in pins} == set()


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_the_demo_model(source: Any, tmp_path: Path) -> None:
    # A copy, because setuptools leaves its build folder in the tree and would put stale modules into the next wheel.
    tree = tmp_path / "tree"
    for folder in source.setuptools["package-dir"].values():
        shutil.copytree(source.root / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", source.project["readme"], *source.project["license-files"]):
        shutil.copy(source.root / name, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("eagleray-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {
        f"{package.replace('.', '/')}/{file.name}"
        for package, folder in source.package_folders.items()
        for file in (tree / folder).iterdir()
        if file.suffix in {".py", ".c", ".h"}
    }
    demo = tree / "models" / "demo"
    expected |= {f"eagleray/models/demo/{file.relative_to(demo)}" for file in demo.rglob("*") if file.is_file()}
    assert expected - held == set()
