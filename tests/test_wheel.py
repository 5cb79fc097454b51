"""The wheel: what is in it, and that it works in an environment of its own, far from the checkout."""

from __future__ import annotations

import configparser
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
FLOORS = {"fedmoe_kernels": "kernels", "fedmoe_core": ".", "fedmoe_bindings": "bindings"}
INPUTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # sha256 of the official text
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, run without this test's own import paths."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy, because a build leaves folders behind in its tree."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    tree.mkdir()
    for name in INPUTS:
        shutil.copy(HOUSE / name, tree)
    for folder in ("fedmoe_core", "kernels", "bindings", "tests"):
        shutil.copytree(HOUSE / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", place]
    run(sys.executable, "-m", "pip", "wheel", tree, *options, cwd=place)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """The interpreter of a fresh environment with the wheel in it; all but fedmoe is this environment's."""
    fresh = wheel.parent / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=wheel.parent)
    python = fresh / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip())
    # A plain line is a path whose own .pth files are not read, so the checkout's editable install stays out of sight.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in sorted(shared)), "utf-8")
    return python


def test_the_wheel_holds_three_packages_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = [path for root, folder in FLOORS.items() for path in (HOUSE / folder / root).rglob("*.py")]
    typed = [HOUSE / folder / root / "py.typed" for root, folder in FLOORS.items()]
    tables = HOUSE.glob("kernels/fedmoe_kernels/tiles/*.json")  # of tiles tuned on a GPU
    pages = [HOUSE / "fedmoe_core" / "reporting" / name for name in ("report.html.jinja", "page.css")]
    pages.append(HOUSE / "fedmoe_core" / "exporting" / "card.md.j2")
    package = {
        path: next(root for root in FLOORS if root in path.parts) for path in (*sources, *typed, *tables, *pages)
    }
    assert shipped == {str(path.relative_to(HOUSE / FLOORS[root])) for path, root in package.items()}
    assert not [name for name in shipped if "test" in name]


def test_a_tile_table_ships(tmp_path: Path) -> None:
    """None is in the checkout until a GPU has run the tuner, so the pattern is held to a table of the test's own."""
    for name in INPUTS:
        shutil.copy(HOUSE / name, tmp_path)
    for root, folder in FLOORS.items():
        (tmp_path / folder / root).mkdir(parents=True)
        (tmp_path / folder / root / "__init__.py").touch()
    tables = tmp_path / "kernels" / "fedmoe_kernels" / "tiles"
    tables.mkdir()
    (tables / "some-gpu.json").write_text("{}", "utf-8")
    run(sys.executable, "setup.py", "--quiet", "build", "--build-lib", "built", cwd=tmp_path)
    assert (tmp_path / "built" / "fedmoe_kernels" / "tiles" / "some-gpu.json").is_file()


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        meta = {
            name.split(".dist-info/")[1]: archive.read(name) for name in archive.namelist() if ".dist-info/" in name
        }
    entries = configparser.ConfigParser()
    entries.read_string(meta["entry_points.txt"].decode())
    assert entries["console_scripts"]["fedmoe"] == "fedmoe_core.cli.main:main"
    assert entries["fedmoe.adapters"]["transformers"] == "fedmoe_bindings.transformers:load_adapter"
    assert entries["fedmoe.sinks"]["tensorboard"] == "fedmoe_bindings.tracking.tensorboard:TensorBoardSink"
    assert {*entries["fedmoe.sinks"]} == {"mlflow", "prometheus", "tensorboard", "wandb"}
    facts = message_from_string(meta["METADATA"].decode())
    assert (facts["License-Expression"], facts["Author"]) == ("Apache-2.0", "The fedmoe authors")
    assert meta["licenses/LICENSE"] == (HOUSE / "LICENSE").read_bytes()
    cited = (HOUSE / "CITATION.cff").read_text("utf-8")
    assert f'version: "{facts["Version"]}"' in cited


def test_the_license_is_the_official_text() -> None:
    ours, blank = "   Copyright 2026 The fedmoe authors\n", "   Copyright [yyyy] [name of copyright owner]\n"
    text = (HOUSE / "LICENSE").read_text("utf-8")
    assert text.count(ours) == 1
    assert hashlib.sha256(text.replace(ours, blank).encode()).hexdigest() == APACHE_2


def test_the_installed_packages_are_the_wheel_s_own(python: Path, tmp_path: Path) -> None:
    code = f"import json, {', '.join(FLOORS)}; print(json.dumps([m.__file__ for m in ({', '.join(FLOORS)})]))"
    for file in json.loads(run(python, "-c", code, cwd=tmp_path)):
        path = Path(file).resolve()
        assert path.is_relative_to(python.parents[1].resolve())
        assert not path.is_relative_to(HOUSE)
        assert (path.parent / "py.typed").is_file()


def test_the_installed_command_works_away_from_the_checkout(python: Path, tmp_path: Path) -> None:
    version = run(python, "-c", "from importlib.metadata import version as v; print(v('fedmoe-core'))", cwd=tmp_path)
    assert run(python.with_name("fedmoe"), "--version", cwd=tmp_path) == f"fedmoe {version}"
    cards = json.loads(run(python.with_name("fedmoe"), "systems", "--json", cwd=tmp_path))
    assert "hfedmoe" in [card["name"] for card in cards]
    code = (
        "import sys; from fedmoe_core.config.systems import PLACES; import fedmoe_bindings.transformers; "
        "from fedmoe_core.algorithms.base import algorithm_class as load; "
        "print({sys.modules[load(name).__module__].__file__ for name in PLACES})"
    )
    assert str(HOUSE) not in run(python, "-c", code, cwd=tmp_path)


def test_the_installed_package_has_its_page_and_card(python: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files; "
        "print(files('fedmoe_core.reporting').joinpath('report.html.jinja').read_text(), "
        "files('fedmoe_core.exporting').joinpath('card.md.j2').read_text())"
    )
    found = run(python, "-c", code, cwd=tmp_path)
    assert found.count("{% macro") == 4
    assert "library_name:" in found


def test_the_environment_can_build_a_wheel() -> None:
    """Without this the other tests would fail with a message of pip's that says less."""
    assert int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
