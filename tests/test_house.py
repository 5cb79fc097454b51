"""The house: imports go down only, each file is one room, nothing reads pickles, and the wheel is pure Python."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMES = {
    "fedmoe_kernels": ROOT / "kernels" / "fedmoe_kernels",
    "fedmoe_core": ROOT / "fedmoe_core",
    "fedmoe_bindings": ROOT / "bindings" / "fedmoe_bindings",
}
MAY_IMPORT = {
    "fedmoe_kernels": {"fedmoe_kernels"},
    "fedmoe_core": {"fedmoe_kernels", "fedmoe_core"},
    "fedmoe_bindings": set(HOMES),
}
FILES = [(package, path) for package, home in HOMES.items() for path in sorted(home.rglob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for _, path in FILES]


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it, and those that it loads by a literal name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {package for package in HOMES if node.value.startswith(f"{package}.")}
    return found


def test_there_are_files_to_read():
    assert len(FILES) > 40


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_imports_go_down_only(package, path):
    assert imports_of(path) & set(HOMES) <= MAY_IMPORT[package]


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_a_file_is_one_room_with_a_sentence_at_its_top(package, path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "over 400 lines: it asks to be two rooms"
    first = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].strip()
    assert first.endswith(".")


@pytest.mark.parametrize("path", [path for package, path in FILES if package == "fedmoe_kernels"], ids=lambda p: p.name)
def test_kernels_know_no_modules_and_no_clients(path):
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.Attribute) and node.attr == "Module" for node in ast.walk(tree))


def test_folders_of_packages_are_not_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bindings" / "__init__.py").exists()


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_inv12_no_pickle_is_ever_read(package, path):
    assert not imports_of(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) not in {("torch", "load"), ("np", "load"), ("dist", "all_gather_object")}


def test_the_wheel_is_pure_python_and_brings_the_command(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, check=True, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"{package}/__init__.py" for package in HOMES} <= set(names)
    assert not any(name.startswith(("tests/", "bench/")) for name in names)
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "fedmoe = fedmoe_core.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()
