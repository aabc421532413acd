"""Size is a budget: small files, short functions, narrow protocols, flat inheritance. A larger one says why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest

_MAX_FILE_LINES = 400
_MAX_FUNCTION_LINES = 60
_MAX_PROTOCOL_METHODS = 5
_MAX_DEMO_BYTES = 20_000_000

# path, or path:function -> why it is one piece. An entry that is not needed any more fails the test too.
_LARGER_FOR_A_REASON: dict[str, str] = {}

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, _Function]]:
    """Every function below ``node`` with its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function | ast.ClassDef):
            name = f"{prefix}{child.name}"
            if isinstance(child, _Function):
                yield name, child
            yield from _functions(child, f"{name}.")
        else:
            yield from _functions(child, prefix)


def _name(node: ast.expr) -> str:
    """``Protocol`` for ``Protocol``, ``typing.Protocol`` and ``Protocol[T]``."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _over_budget(modules: Any) -> set[str]:
    files = {module.path for module in modules if module.num_lines > _MAX_FILE_LINES}
    functions = {
        f"{module.path}:{name}"
        for module in modules
        for name, function in _functions(module.tree)
        if (function.end_lineno or function.lineno) - function.lineno + 1 > _MAX_FUNCTION_LINES
    }
    return files | functions


def _wide_protocols(tree: ast.Module) -> list[str]:
    return [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "Protocol" in map(_name, node.bases)
        if sum(isinstance(member, _Function) for member in node.body) > _MAX_PROTOCOL_METHODS
    ]


def _imported_names(tree: ast.Module, path: str) -> dict[str, str]:
    """Name in the module -> where it is defined, for what is ours: its own classes and imports from eagleray."""
    here = "eagleray." + path.removesuffix(".py").replace("/", ".")
    names = {node.name: f"{here}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eagleray."):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _deep_classes(modules: Any) -> list[str]:
    """Classes whose grandparent is ours too. Exceptions, pydantic models, msgspec structs and protocols may be."""
    bases: dict[str, list[str]] = {}
    for module in modules:
        ours = _imported_names(module.tree, module.path)
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                bases[ours[node.name]] = [ours.get(_name(base), _name(base)) for base in node.bases]

    def ancestors(name: str) -> set[str]:
        return {name}.union(*(ancestors(base) for base in bases.get(name, [])))

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases[name] if base in bases), default=-1)

    exempt = {"Exception", "BaseModel", "Struct", "Protocol"}
    return sorted(name for name in bases if depth(name) > 1 and not ancestors(name) & exempt)


def test_files_and_functions_stay_within_their_budget_or_give_a_reason(source: Any) -> None:
    assert _over_budget(source.library + source.programs) == set(_LARGER_FOR_A_REASON)


def test_protocols_have_at_most_five_methods(source: Any) -> None:
    assert {m.path: wide for m in source.library if (wide := _wide_protocols(m.tree))} == {}


def test_no_class_of_ours_has_a_grandparent_of_ours(source: Any) -> None:
    assert _deep_classes(source.library) == []


def test_the_packaged_model_and_its_head_are_at_most_20_megabytes_together(source: Any) -> None:
    demo = source.root / "models" / "demo"
    sizes = {file.relative_to(demo).as_posix(): file.stat().st_size for file in demo.rglob("*.safetensors")}
    assert {"model.safetensors", "draft/model.safetensors"} <= sizes.keys()
    assert sum(sizes.values()) <= _MAX_DEMO_BYTES, sizes


def test_a_long_function_is_found_inside_a_class(module_of: Any) -> None:
    body = "\n".join(f"        x = {line}" for line in range(_MAX_FUNCTION_LINES))
    module = module_of(f"class A:\n    def long(self):\n{body}\n")
    assert _over_budget([module]) == {"planted/module.py:A.long"}


def test_a_wide_protocol_is_found_when_generic(module_of: Any) -> None:
    methods = "\n".join(f"    def m{index}(self): ..." for index in range(_MAX_PROTOCOL_METHODS + 1))
    assert _wide_protocols(module_of(f"class A(Protocol[T]):\n{methods}\n").tree) == ["A"]


@pytest.mark.parametrize(
    ("root_base", "found"), [("object", ["eagleray.planted.module.C"]), ("Exception", []), ("BaseModel", [])]
)
def test_a_grandchild_is_found_unless_it_is_data_or_an_error(module_of: Any, root_base: str, found: list[str]) -> None:
    module = module_of(f"class A({root_base}): ...\nclass B(A): ...\nclass C(B): ...\n")
    assert _deep_classes([module]) == found
