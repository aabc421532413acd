"""What can be imported where torch and ray are not installed. The layers are import-linter's matter (`make lint`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

_WITHOUT_TORCH = ("core", "text", "engine/scheduling", "kv_transfer", "router", "api")
_IMPORT_ALL = """
import importlib, sys
sys.modules["torch"] = sys.modules["ray"] = None  # importing either now fails
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_what_decides_routes_moves_bytes_and_answers_http_needs_neither_torch_nor_ray(
    source: Any, tmp_path: Path
) -> None:
    names = [
        "eagleray." + module.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for module in source.library
        if module.path.startswith(tuple(f"{folder}/" for folder in _WITHOUT_TORCH))
    ]
    assert len(names) > 50
    run = [sys.executable, "-c", _IMPORT_ALL, *names]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_importing_eagleray_loads_neither_torch_nor_ray_until_a_public_name_is_used(tmp_path: Path) -> None:
    program = "import sys, eagleray; print([name for name in ('torch', 'ray') if name in sys.modules])"
    run = [sys.executable, "-c", program]
    assert subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"
