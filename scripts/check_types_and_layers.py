"""Type-checks the packages and holds their imports to the layers, and makes sure that both tools saw every module.

The packages lie at the repository root but are imported as ``eagleray.<package>``: neither mypy nor import-linter finds
them so. ``.typecheck/eagleray`` shows them the tree as it is imported, linked together from pyproject's package-dir.
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
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    package_dir = pyproject["tool"]["setuptools"]["package-dir"]
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


def run(command: list[str | Path], folder: Path) -> str:
    """Run a checker in ``folder``; passes its output on and returns it. Exits with its status if it is not content."""
    environment = os.environ | {"MYPYPATH": str(LINKS)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout


def check_count(tool: str, output: str, pattern: str, num_modules: int) -> None:
    found = re.search(pattern, output)
    num_seen = int(found[1]) if found else None
    if num_seen != num_modules:
        sys.exit(f"{tool} saw {num_seen} of {num_modules} modules, so what it says counts for nothing")


def main() -> None:
    top = link_packages()
    num_modules = sum(1 for entry in top.iterdir() for _ in ([entry] if entry.suffix == ".py" else entry.rglob("*.py")))
    tools = Path(sys.executable).parent
    output = run([tools / "mypy", "--package", PREFIX], ROOT)
    check_count("mypy", output, r"no issues found in (\d+) source", num_modules)
    # lint-imports puts its working folder before everything else on the path, and its own count includes what we import
    # from others: hence the folder, and the second command, which builds the same graph and counts our modules in it.
    run([tools / "lint-imports", "--no-logo", "--config", ROOT / "pyproject.toml"], LINKS)
    count = f"import grimp; print('import graph:', len(grimp.build_graph('{PREFIX}').modules), 'modules')"
    check_count("import-linter", run([sys.executable, "-c", count], LINKS), r"graph: (\d+) modules", num_modules)


if __name__ == "__main__":
    main()
