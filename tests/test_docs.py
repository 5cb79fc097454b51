"""The documentation is true: examples run, every key of a configuration is explained, and the site builds."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from fedmoe_core.budget.devices import DEVICES
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.schema import schema_of
from fedmoe_core.config.sections import TrainConfig
from fedmoe_core.config.systems import TITLES

HOUSE = Path(__file__).parents[1]
FLOORS = {"fedmoe_kernels": "kernels", "fedmoe_core": ".", "fedmoe_bindings": "bindings"}


def _generate() -> ModuleType:
    """The hooks of the site; they need mkdocs only when a site is built."""
    spec = importlib.util.spec_from_file_location("docs_generate", HOUSE / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _with_examples() -> list[str]:
    """Modules whose text has an example, by name."""
    found = []
    for root, folder in FLOORS.items():
        for path in sorted((HOUSE / folder / root).rglob("*.py")):
            if ">>> " in path.read_text("utf-8"):
                found.append(".".join(path.relative_to(HOUSE / folder).with_suffix("").parts))
    return found


generate = _generate()
EXAMPLES = {name: doctest.DocTestFinder(exclude_empty=True).find(import_module(name)) for name in _with_examples()}
CASES = [case for cases in EXAMPLES.values() for case in cases if case.examples]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_example_gives_what_it_shows(case: doctest.DocTest) -> None:
    assert "Example:" in (case.docstring or ""), "an example stands under Example:, so that the site shows it"
    shown: list[str] = []
    assert doctest.DocTestRunner().run(case, out=shown.append).failed == 0, "".join(shown)


def test_a_dozen_docstrings_have_an_example() -> None:
    names = {
        case.name.removeprefix(f"{module}.") for module, cases in EXAMPLES.items() for case in cases if case.examples
    }
    assert len(names) >= 12
    verbs = {"MoE", "route", "moe_mlp", "Routing.from_topk", "SlotMap.build", "ExpertScores", "Budget.parse"}
    assert verbs | {"ExpertPlan", "Accumulator", "knapsack", "Config", "Config.load", "use_fedmoe"} <= names
    assert all(any(example.want for example in case.examples) for case in CASES)


def test_every_key_has_a_meaning_and_stands_on_the_page() -> None:
    page = generate.configuration_page()
    for section, record in generate.sections():
        for field, meaning in generate.meanings(record).items():
            key = f"{section}.{field}" if section else field
            if key not in schema_of(Config):
                assert not meaning  # a section, which has its own docstring
                continue
            assert re.fullmatch(r"\S.*[^\s.]", meaning), f"{key}: write its meaning as a comment in the code"
            assert f"`{key}`{{ #{key} }}" in page
            assert generate._cell(meaning) in page
    shown = re.findall(r"^\| `([\w.]+)`\{ #\1 \} \|", page, flags=re.MULTILINE)
    assert sorted(shown) == sorted(schema_of(Config))


def test_a_meaning_is_read_from_its_own_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Made:\n    one: int = 1  # at the end\n"
        "    # on the line\n    # before\n    two: str = '# no comment'\n    three: int = 3\n\n    # of nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = import_module("made_up").Made
    assert generate.meanings(made) == {"one": "at the end", "two": "on the line before", "three": ""}


def test_the_pages_made_from_the_code_say_what_the_code_says() -> None:
    page = generate.configuration_page()
    defaults = f"`{TrainConfig.lr}`<br>*labelled*: `0.003`<br>*dense*: `0.0005`"
    assert f"`train.lr`{{ #train.lr }} | number greater than 0 | {defaults} |" in page
    systems = generate.systems_page()
    assert set(re.findall(r"^## .* \{ #(\w+) \}$", systems, flags=re.MULTILINE)) == set(TITLES)
    assert all(f"`{device.name}`" in generate.devices_page() for device in DEVICES)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a dead link, a page without a place and an unknown argument are errors."""
    for tool in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f'{tool} is not installed, so no site can be built here; pip install -e ".[docs]"')
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HOUSE, env=environment)
    assert done.returncode == 0, done.stderr
    return place


def test_the_site_has_every_page_of_its_table(site: Path) -> None:
    listed = re.findall(r": ([\w/]+)\.md$", (HOUSE / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE)
    assert len(listed) > 20
    assert [name for name in listed if not (site / f"{name}.html").is_file()] == []


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]*)")
    for page in site.rglob("*.html"):
        assert loads.findall(page.read_text("utf-8")) == [], page


def test_the_site_shows_examples_as_code_and_files_of_the_repository(site: Path) -> None:
    page = (site / "api" / "core.html").read_text("utf-8")
    assert "&gt;&gt;&gt;" in page
    assert "Example:" not in page
    assert (site / "repository" / "bench" / "results" / "study" / "stdlib" / "tiers.png").is_file()
    assert 'src="repository/bench/results/study/stdlib/tiers.png"' in (site / "results.html").read_text("utf-8")
