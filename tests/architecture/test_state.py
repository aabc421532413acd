"""Pass it in: no module-level mutable state, and one reader of environment variables."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest

_MAY_READ_THE_ENVIRONMENT = {"core/config.py", "kernels/cache_folder.py"}
_MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_MUTABLE_TYPES = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter"}
_CONVENTIONAL = {"__all__"}


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        callee = value.func
        return (callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", "")) in _MUTABLE_TYPES
    return isinstance(value, _MUTABLE_DISPLAYS)


def _mutable_state(tree: ast.Module) -> Iterator[str]:
    """Module-level containers that are not declared ``Final``, and ``global`` statements."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and _is_mutable(node.value):
            yield from ({ast.unparse(target) for target in node.targets} - _CONVENTIONAL)
        elif (
            isinstance(node, ast.AnnAssign) and _is_mutable(node.value) and "Final" not in ast.unparse(node.annotation)
        ):
            yield ast.unparse(node.target)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield ast.unparse(node)


def _reads_environment(tree: ast.Module) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"})
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in name.name for name in node.names))
        for node in ast.walk(tree)
    )


def test_modules_hold_no_mutable_state(source: Any) -> None:
    assert {m.path: state for m in source.library if (state := list(_mutable_state(m.tree)))} == {}


def test_environment_variables_are_read_in_one_place(source: Any) -> None:
    readers = {module.path for module in source.library if _reads_environment(module.tree)}
    assert readers - _MAY_READ_THE_ENVIRONMENT == set()


@pytest.mark.parametrize(
    "line",
    ["a = []", "a: dict[str, int] = {}", "a = collections.deque()", "def f():\n    global a", "a = {x for x in b}"],
)
def test_mutable_state_is_found(line: str) -> None:
    assert len(list(_mutable_state(ast.parse(line)))) == 1


@pytest.mark.parametrize("line", ["A: Final = {}", "A = (1, 2)", "def f():\n    a = []", "__all__ = ['a']"])
def test_constants_and_local_names_are_no_state(line: str) -> None:
    assert list(_mutable_state(ast.parse(line))) == []


@pytest.mark.parametrize("line", ["os.environ['A']", "os.getenv('A')", "from os import environ"])
def test_a_reader_of_the_environment_is_found(line: str) -> None:
    assert _reads_environment(ast.parse(line))
