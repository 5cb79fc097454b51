"""Files and modules that pages, comments and scripts inside strings name are there: a move leaves none behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
FOLDERS = {"fedmoe_core": ".", "fedmoe_kernels": "kernels", "fedmoe_bindings": "bindings", "bench": "."}
# A path from the repository's root; a word in capitals stands for what a reader fills in.
PATH = re.compile(
    r"(?<![\w./{-])(?:tests|bench|fedmoe_core|kernels|bindings|examples)/[\w./-]*\w\.(?:py|md|toml|sh|c|jinja|json)\b"
)
OPEN = re.compile(r"\b[A-Z]{3,}\b")
IMPORT = re.compile(r"\bfrom ((?:fedmoe_core|fedmoe_kernels|fedmoe_bindings|bench)(?:\.\w+)*) import (\w+(?:, \w+)*)")


def texts() -> Iterator[Path]:
    """Every file that people read or run, but the history and what benchmarks have recorded."""
    listed = subprocess.run(["git", "ls-files"], cwd=HOUSE, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a checkout")
    for name in listed.stdout.splitlines():
        kinds = name.endswith((".py", ".md", ".sh", ".yml", ".toml")) or name in ("Makefile", ".ci/run")
        if kinds and name != "CHANGELOG.md" and not name.startswith("bench/results") and (HOUSE / name).is_file():
            yield HOUSE / name


def module(name: str) -> Path | None:
    """The file of a module of ours, by its dotted name."""
    root, *rest = name.split(".")
    place = HOUSE.joinpath(FOLDERS[root], root, *rest)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


def unknown(text: str) -> list[str]:
    """Paths that lead nowhere, and imports of what is not there."""
    found = [path for path in PATH.findall(text) if not (HOUSE / path).exists() and not OPEN.search(path)]
    for home, names in IMPORT.findall(text):
        source = module(home)
        words = set() if source is None else set(re.findall(r"\w+", source.read_text("utf-8")))
        found += [f"{home}.{name}" for name in names.split(", ") if name not in words and not module(f"{home}.{name}")]
    return found


def test_what_is_named_is_there() -> None:
    others = (path for path in texts() if path != Path(__file__))
    found = {str(path.relative_to(HOUSE)): unknown(path.read_text("utf-8")) for path in others}
    assert {name: lost for name, lost in found.items() if lost} == {}


def test_the_search_finds_what_is_lost() -> None:
    assert unknown("see tests/core/test_gone.py") == ["tests/core/test_gone.py"]
    assert unknown('code = "from fedmoe_core.simulation import launcher"') == ["fedmoe_core.simulation.launcher"]
    assert unknown("from fedmoe_core.nowhere import x") == ["fedmoe_core.nowhere.x"]
    assert not unknown(
        "from fedmoe_core.simulation import launch, run\nfrom fedmoe_core import MoE; tests/test_house.py"
    )
