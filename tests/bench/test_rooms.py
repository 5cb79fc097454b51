"""The rooms of bench: imports go down one list, no files import each other in a circle, every room has one sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
# Lowest first. Files of bench itself (cpu, host, landing, the microbenchmarks) are above all rooms.
ROOMS = (
    *("bench.common", "bench.aot", "bench.stand_in", "bench.tune"),
    *("bench.gpu.measure", "bench.gpu", "bench.study", "bench.upstream", "bench.fedavg", "bench.trust", "bench"),
)
MOST_FILES = 14  # of a folder, besides __init__.py
TOPS = ("bench", "bindings", "docs", "examples", "fedmoe_core", "kernels", "tests")
FOLDERS = [folder for top in TOPS for folder in (HOUSE / top, *sorted((HOUSE / top).rglob("*")))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted((HOUSE / "bench").rglob("*.py"))}


def room_of(module: str) -> int:
    """The place in ROOMS of the room that a module, or a room itself, belongs to."""
    return max(
        (place for place, room in enumerate(ROOMS) if f"{module}.".startswith(f"{room}.")),
        key=lambda place: len(ROOMS[place]),
    )


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Modules of bench that a module imports, wherever in it: of ``from a import b`` the file that b is, or is in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Each module of bench, with those of bench that it imports."""
    found = {name: set(imports_of(ast.parse(path.read_text()))) for name, path in MODULES.items()}
    return {name: {one for one in names if one in MODULES and one != name} for name, names in found.items()}


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, none where there is no circle."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_list(module: str) -> None:
    upward = [name for name in graph()[module] if room_of(name) > room_of(module)]
    assert upward == []


def test_no_files_import_each_other_in_a_circle() -> None:
    arrows = graph()
    assert sum(map(len, arrows.values())) > 80, "the search sees the imports"
    assert circle(arrows) == []


def test_the_search_finds_a_circle_and_an_upward_arrow() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}
    (name,) = imports_of(ast.parse("def late():\n    from bench.gpu import conduct"))
    assert room_of(name) > room_of("bench.gpu.measure.timing") > room_of("bench.tune.run") > room_of("bench.aot.sass")
    assert list(imports_of(ast.parse("from bench.gpu.conduct import Conductor"))) == ["bench.gpu.conduct"]


def test_every_folder_of_bench_with_files_is_a_room() -> None:
    rooms = {module_of(path / "__init__.py") for path in {path.parent for path in MODULES.values()}}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_one_sentence_what_it_is(room: str) -> None:
    said = ast.get_docstring(ast.parse(MODULES[room].read_text()))
    assert said, room
    assert said.endswith(".")
    assert "\n\n" not in said
    assert ". " not in said


def test_no_folder_has_more_files_than_a_reader_can_hold() -> None:
    counts = {
        str(folder.relative_to(HOUSE)): len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        for folder in FOLDERS
        if folder.is_dir()
    }
    assert {name: count for name, count in counts.items() if count > MOST_FILES} == {}
    assert counts["bench/gpu"] > 5


def test_no_two_files_of_tests_have_one_name() -> None:
    """Without an __init__.py in tests, pytest takes two files of one stem for one module."""
    stems = [path.stem for path in (HOUSE / "tests").rglob("*.py") if path.stem != "conftest"]
    assert sorted({stem for stem in stems if stems.count(stem) > 1}) == []
