"""Every module of ours that is imported from is there; mypy takes a missing one for a package without types."""

from __future__ import annotations

import ast
from collections.abc import Set

import pytest
from test_house import HOUSE, SOURCES, floor_of, module_of, named


def from_nowhere(tree: ast.AST, modules: Set[str]) -> list[str]:
    """Modules of ours that are imported from and are not there."""
    sources = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return [name for name in sources if floor_of(name) is not None and name not in modules]


@pytest.mark.parametrize("folder", ["kernels", "fedmoe_core", "bindings", "bench", "tests", "examples", "docs"])
def test_our_own_modules_are_where_they_are_imported_from(folder: str) -> None:
    modules = {module_of(path) for path in SOURCES}
    trees = {named(path): ast.parse(path.read_text()) for path in (HOUSE / folder).rglob("*.py")}
    assert {name: found for name, tree in trees.items() if (found := from_nowhere(tree, modules))} == {}
    gone = ".".join(("fedmoe_core", "gone"))  # in one piece it would be a name that is not there
    assert from_nowhere(ast.parse(f"from {gone} import name"), modules)
