"""The package reads from top to bottom: a module imports only from modules further down, and no name is used twice."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "nnunet_lite"
# A module imports from its own entry, without circles, and from those after it.
LAYERS = (
    "cli", "commands", "reporting", "evaluation", "inference", "training", "models", "networks",
    "preprocess",  # the import path of older scripts
    "preprocessing", "planning", "data", "cluster", "settings", "workspace", "files", "system", "errors", "log",
)  # fmt: skip
MOST_LOCAL_IMPORTS = 40
# What is left of the old layout; these become empty.
UPWARDS: set[tuple[str, str]] = set()
IN_CIRCLES: set[str] = set()
SHARED_NAMES: set[str] = set()


@cache
def modules() -> dict[str, ast.Module]:
    """The modules of the package by their names below it, such as "training.loss"."""
    files = sorted(file for file in ROOT.rglob("*.py") if file.stem not in ("__init__", "__main__"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text()) for file in files}


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes_of(tree: ast.AST) -> list[ast.AST]:
    """All nodes of a module but those under `if TYPE_CHECKING`."""
    children = [child for child in ast.iter_child_nodes(tree) if not is_typing_only(child)]
    return [node for child in children for node in (child, *nodes_of(child))]


@cache
def imports() -> dict[str, set[str]]:
    """Which modules of the package each module imports, at the top or in functions."""
    found: dict[str, set[str]] = {}
    for name, tree in modules().items():
        named: set[str] = set()
        for node in nodes_of(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = {one.removeprefix("nnunet_lite.") for one in named} & set(modules())
    return found


def layer_of(module: str) -> int:
    return LAYERS.index(module.partition(".")[0])


def test_every_module_has_a_layer() -> None:
    assert {name.partition(".")[0] for name in modules()} <= set(LAYERS)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_below(module: str) -> None:
    above = {(module, other) for other in imports()[module] if layer_of(other) < layer_of(module)}
    assert not above - UPWARDS, "move what both need into a module below"


def test_there_are_no_circles() -> None:
    """Modules whose imports are all removed are removed, until none or only circles are left."""
    left = {name: set(others) for name, others in imports().items()}
    while leaves := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in leaves}
    assert not left.keys() - IN_CIRCLES, f"circles of imports, or modules that import from one: {', '.join(left)}"


def test_imports_are_at_the_top() -> None:
    inside = {
        (module, node.lineno)
        for module, tree in modules().items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert len(inside) <= MOST_LOCAL_IMPORTS, sorted(inside)


def test_no_name_is_used_twice() -> None:
    """Classes, and functions that other modules may call; only a command and its own function share a name."""
    names = Counter(
        node.name
        for module, tree in modules().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        or (isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and module != "cli")
    )
    assert {name for name, n in names.items() if n > 1} <= SHARED_NAMES
