"""No pickle is ever read (invariant 12)."""

from __future__ import annotations

import ast
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import forge, in_child, loaded_round, refused, save_round

REPOSITORY = Path(__file__).parents[2]


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_inv12_pickle_in_place_of_a_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    marker, data = tmp_path / "pwned", pickle.dumps(Payload(tmp_path / "pwned"))
    torch.save({"a": Payload(marker)}, tmp_path / "torch.pt")
    for content in (data, (tmp_path / "torch.pt").read_bytes()):
        forge(tmp_path / "run", content)
        assert "is not a safetensors file" in refused(tmp_path / "run")
        (tmp_path / "run" / "checkpoint.json").write_bytes(content)
        assert "is damaged or cut short" in refused(tmp_path / "run")
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # the payload was live


def _pickle_readers(tree: ast.AST) -> Iterator[str]:
    """Every way in a module to read pickle, by name."""
    modules = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.split(".")[0] in modules)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "pd.read_pickle"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
            name, value = safe.get(ast.unparse(node.func), ("", ""))
            if options.get(name) != value:
                yield ast.unparse(node)


def test_inv12_no_module_of_ours_can_read_pickle() -> None:
    files = [path for name in ("fedmoe_core", "kernels", "bindings") for path in (REPOSITORY / name).rglob("*.py")]
    assert len(files) > 5
    found = {str(path): list(_pickle_readers(ast.parse(path.read_text()))) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)"],
)
def test_inv12_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(_pickle_readers(ast.parse(source)))
    assert not list(_pickle_readers(ast.parse("torch.load(f, weights_only=True); np.load(f, allow_pickle=False)")))


def test_inv12_saving_and_loading_never_enters_the_unpickler(tmp_path: Path) -> None:
    """Python's own audit event for pickle, watched while a checkpoint goes out and in."""

    def watched() -> None:
        seen: list[str] = []
        sys.addaudithook(lambda event, _: seen.append(event) if event.startswith("pickle") else None)
        save_round(tmp_path, 1)
        loaded_round(tmp_path)
        assert seen == []
        pickle.loads(pickle.dumps(Path("x")))
        assert seen  # the hook does hear

    assert in_child(watched) == 0
