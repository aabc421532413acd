"""Type-checks the packages and holds their imports to the layers, and makes sure that both tools saw every module.

The packages lie at the repository root but are imported as ``eagleray.<package>``: neither mypy nor import-linter finds
them so. ``.typecheck/eagleray`` shows them the tree as it is imported, by links made from pyproject's package-dir table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
LINKS: Final = ROOT / ".typecheck"
PREFIX: Final = "eagleray"


def link_packages(links: Path = LINKS) -> Path:
    """Make ``links/eagleray`` anew; returns it. Everything in it links to a file or folder of the repository."""
    package_dir = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(links, ignore_errors=True)
    top = links / PREFIX
    top.mkdir(parents=True)
    for file in (ROOT / package_dir[PREFIX]).iterdir():
        if file.is_file():
            (top / file.name).symlink_to(file)
    for name, folder in package_dir.items():
        if name != PREFIX:
            (top / name.removeprefix(f"{PREFIX}.")).symlink_to(ROOT / folder, target_is_directory=True)
    return top


def run_and_count(command: list[str], pattern: str, environment: dict[str, str]) -> int:
    """Run a checker, pass its output on, and return the number that ``pattern`` finds in it. Exits if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, end="")
    if done.returncode != 0:
        sys.exit(done.returncode)
    found = re.search(pattern, done.stdout)
    if found is None:
        sys.exit(f"{command[0]} no longer says how much it checked: nothing matches {pattern!r}")
    return int(found[1])


def main() -> None:
    top = link_packages()
    num_modules = sum(1 for folder in top.iterdir() for _ in ([folder] if folder.suffix == ".py" else folder.rglob("*.py")))
    tools = Path(sys.executable).parent
    seen = {
        "mypy": run_and_count(
            [str(tools / "mypy"), "--package", PREFIX], r"no issues found in (\d+) source", {"MYPYPATH": str(LINKS)}
        ),
        "import-linter": run_and_count(
            [str(tools / "lint-imports"), "--no-logo"], r"Analyzed (\d+) files", {"PYTHONPATH": str(LINKS)}
        ),
    }
    for tool, num_seen in seen.items():
        if num_seen != num_modules:
            sys.exit(f"{tool} saw {num_seen} of {num_modules} modules: its answer is worth nothing")


if __name__ == "__main__":
    main()
