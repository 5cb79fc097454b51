"""The house rules that a reader cannot check by eye: imports go down only, rooms stay small, nothing reads pickle."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
FLOORS = {"fedmoe_kernels": "kernels", "fedmoe_core": ".", "fedmoe_bindings": "bindings"}  # lowest first
LONGEST = 400  # lines; a longer file asks to be two
# The rooms of fedmoe_core, lowest first: text and layers; a model made of layers; what a device bears of a model; the
# settings; what is said in a round; who matters; what a client does; what the server does; the systems, which do both;
# a run; its report; its model for others, with a card; a run that goes on, which needs what the report knows of a
# directory; many runs; a command.
ROOMS = (
    *("base", "data", "layer", "model", "budget", "config", "messages", "selection", "client", "server"),
    *("privacy", "algorithms", "simulation", "reporting", "exporting", "watching", "comparison", "cli"),
)
CROWDED = 14  # files in one folder, ``__init__.py`` not counted; a fuller one asks to be two
SOURCES = sorted(path for package, folder in FLOORS.items() for path in (HOUSE / folder / package).rglob("*.py"))
NOT_OURS = {".venv", ".venv-oldest", ".venv-gpu", ".venv-flower", "build", "dist", "runs", ".git"}
# What tensors in, tensors out may lean on; nn.Module, frameworks and file formats belong to the floors above.
KERNEL_FRIENDS = {"torch", "triton", "numpy", "fedmoe_kernels", *sys.stdlib_module_names}
# What a package is called where it is installed from, when that is not the name it is imported by.
DISTRIBUTIONS = {
    "dp_accounting": "dp-accounting",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
}
# Words that cost a second reading; write "is not a", "again", "midway", "instead of", or name the thing that acts.
# "There is no X" is plain.
RIDDLES = re.compile(
    r"(?<!there )\bis\s+no\s+(?!longer|more|less)|(?<!there )\bare\s+no\s+(?!longer|more)|\banew\b|\bwhoever\b"
    r"|\bhalf\s+way\b|\bin\s+(?:the\s+)?place\s+of\b|\bthat\s+is\s+none\b|\bfor\s+ever\b|\bas\s+it\s+were\b"
    r"|\bnot\s+to\s+be\s+had\b|\bnobody\b|\b(?:some|any|every)body\b",
    flags=re.IGNORECASE,
)


def named(path: Path) -> str:
    return str(path.relative_to(HOUSE))


def modules_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it: ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its floor; write the package's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def floor_of(module: str) -> int | None:
    head = module.split(".")[0]
    return list(FLOORS).index(head) if head in FLOORS else None


def upward(tree: ast.AST, package: str) -> list[str]:
    """Imports of a higher floor than ``package``'s own."""
    own = list(FLOORS).index(package)
    return [name for name in modules_of(tree) if (floor := floor_of(name)) is not None and floor > own]


def package_of(path: Path) -> str:
    return next(part for part in path.relative_to(HOUSE).parts if part in FLOORS)


def module_of(path: Path) -> str:
    parts = path.relative_to(HOUSE / FLOORS[package_of(path)]).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def upstairs(tree: ast.AST, room: str) -> list[str]:
    """Imports of a room of fedmoe_core above ``room``, those for types and those inside functions included."""
    rooms = [(name, name.split(".")[1]) for name in modules_of(tree) if name.startswith("fedmoe_core.")]
    return [name for name, head in rooms if head in ROOMS and ROOMS.index(head) > ROOMS.index(room)]


def files_needed(tree: ast.AST, modules: Set[str]) -> set[str]:
    """The modules that a module imports; a package counts only where one of its own names is taken."""
    found = set(modules_of(tree))
    return {name for name in found & modules if not any(other.startswith(f"{name}.") for other in found & modules)}


def circles(needs: Mapping[str, set[str]]) -> list[str]:
    """The names that lie on a circle of arrows: what is left once all that leads nowhere has been taken away."""
    left = {name: {other for other in others if other != name} for name, others in needs.items()}
    while ends := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in ends}
    return sorted(left)


def pickle_readers(tree: ast.AST) -> list[str]:
    """Every call or import in a module that can run what it reads: pickle, or the code beside a model on a hub.

    torchrun's launcher is one, by its c10d rendezvous.
    """
    launchers = tuple(f"torch.distributed.{name}" for name in ("elastic", "launcher", "run"))
    heads = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
    found = [name for name in modules_of(tree) if name.split(".")[0] in heads or name.startswith(launchers)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        unsafe_load = called == "torch.load" and options.get("weights_only") != "True"
        unsafe_numpy = called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False"
        sent_objects = re.search(r"\b(all_gather|gather|broadcast|scatter)_object", called)
        foreign_code = options.get("trust_remote_code", "False") != "False"
        if unsafe_load or unsafe_numpy or sent_objects or foreign_code or called.endswith("read_pickle"):
            found.append(ast.unparse(node))
    return found


def loose_words(tree: ast.AST) -> list[str]:
    """Calls that print text which is neither constant nor JSON, past the one door to the terminal."""
    doors = {"print", "echo", "typer.echo", "click.echo", "typer.secho", "click.secho"}
    doors |= {"sys.stdout.write", "sys.stderr.write"}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        sure = ("json.dumps(", "Text(visible(", "plan_table(", "groups_table(", "watch_view(")
        safe = [ast.unparse(arg).startswith(sure) for arg in node.args]
        constant = [isinstance(arg, ast.Constant) for arg in node.args]
        consoles = called.endswith(("console.print", "progress.print"))
        if (called in doors or consoles) and not all(a or b for a, b in zip(safe, constant, strict=True)):
            found.append(ast.unparse(node))
    return found


def undeclared(tree: ast.AST, declared: set[str]) -> set[str]:
    """Packages that a module imports, wherever in it, and that are not ours, Python's or in ``declared``."""
    heads = {name.split(".")[0] for name in modules_of(tree)}
    ours = {*FLOORS, *sys.stdlib_module_names}
    return {DISTRIBUTIONS.get(head, head) for head in heads - ours} - declared


def riddles(source: str) -> list[str]:
    """``line: words`` for every riddle in the docstrings, messages and comments of a module."""
    texts = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts += [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    return [
        f"{first + text.count(chr(10), 0, found.start())}: {' '.join(found[0].split())}"
        for first, text in texts
        for found in RIDDLES.finditer(text)
    ]


def test_the_search_sees_all_three_packages() -> None:
    assert {package_of(path) for path in SOURCES} == set(FLOORS)
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_go_down_only(path: Path) -> None:
    assert upward(ast.parse(path.read_text()), package_of(path)) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("fedmoe_kernels", "from fedmoe_core.messages.plan import ExpertPlan"),
        ("fedmoe_kernels", "def late():\n    import fedmoe_bindings.transformers.live.adapter"),
        ("fedmoe_core", "import_module('fedmoe_bindings.transformers.live.adapter')"),
        ("fedmoe_core", "from fedmoe_bindings import transformers"),
    ],
)
def test_the_search_finds_an_upward_arrow(package: str, source: str) -> None:
    assert upward(ast.parse(source), package)
    assert not upward(ast.parse("import fedmoe_kernels, torch"), package)


@pytest.mark.parametrize("path", [path for path in SOURCES if package_of(path) != "fedmoe_bindings"], ids=named)
def test_core_and_kernels_name_no_binding(path: Path) -> None:
    """Adapters are found by their entry point, so that not even a string leads upward."""
    assert "fedmoe_bindings" not in path.read_text()


@pytest.mark.parametrize("path", [path for path in SOURCES if package_of(path) == "fedmoe_kernels"], ids=named)
def test_kernels_are_tensors_in_tensors_out(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert {name.split(".")[0] for name in modules_of(tree)} <= KERNEL_FRIENDS
    modules = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if ast.unparse(base).split(".")[-1] in ("Module", "Parameter")
    ]
    assert [node.name for node in modules] == []
    uses = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [use for use in uses if use.endswith(("nn.Module", "nn.Parameter"))] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if package_of(path) == "fedmoe_core"], ids=named)
def test_rooms_import_lower_rooms_only(path: Path) -> None:
    parts = module_of(path).split(".")
    if len(parts) > 1:  # the package itself names the public ones of all rooms, lazily
        assert upstairs(ast.parse(path.read_text()), parts[1]) == []


def test_the_search_finds_a_way_upstairs() -> None:
    for source in ("def late():\n    from fedmoe_core.server.state import ServerState", "import fedmoe_core.cli.main"):
        assert upstairs(ast.parse(source), "client")
    assert not upstairs(ast.parse("from fedmoe_core.client.step import Stepper"), "client")


def test_no_circle_among_files() -> None:
    modules = {module_of(path): path for path in SOURCES}
    needs = {name: files_needed(ast.parse(path.read_text()), modules.keys()) for name, path in modules.items()}
    assert circles(needs) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", [*SOURCES, *(HOUSE / "tests" / "support" / "equations").glob("*.py")], ids=named)
def test_a_name_that_another_file_takes_has_no_underscore(path: Path) -> None:
    taken = [name.rpartition(".")[2] for name in modules_of(ast.parse(path.read_text())) if floor_of(name) is not None]
    assert [name for name in taken if name.startswith("_") and not name.startswith("__")] == []


def test_every_room_is_listed_and_says_what_it_is() -> None:
    core = HOUSE / "fedmoe_core"
    assert {path.name for path in core.iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    assert {path.name for path in core.glob("*.py")} == {"__init__.py"}
    for path in (path for path in core.rglob("__init__.py") if path.parent != core):
        (sentence,) = ast.parse(path.read_text()).body
        assert isinstance(sentence, ast.Expr), f"{named(path)} holds more than its sentence"
    lines = (HOUSE / "CONTRIBUTING.md").read_text("utf-8").splitlines()
    listed = [line.split("`")[1].rstrip("/") for line in lines if line.startswith("| `") and line.count("|") == 3]
    assert listed == list(reversed(ROOMS))


def test_no_file_says_where_packages_are_fetched_from() -> None:
    """Who installs has chosen that already, in the settings of pip or of the image."""
    names = ("Dockerfile", "Makefile", "*.py", "*.sh", "*.toml", "*.md", "*.yml", "*.ipynb", "run")
    hosts = re.compile(
        "(extra-)?index" + "-url|find" + "-links|pypi" + r"\.org|download\.py" + r"torch\.org", re.IGNORECASE
    )
    files = {path for name in names for path in HOUSE.rglob(name) if not set(path.relative_to(HOUSE).parts) & NOT_OURS}
    assert HOUSE / "examples" / "cluster" / "Dockerfile" in files
    assert [named(path) for path in sorted(files) if path.is_file() and hosts.search(path.read_text("utf-8"))] == []


def test_no_folder_is_crowded() -> None:
    folders = Counter(path.parent for path in HOUSE.rglob("*.py") if path.name != "__init__.py")
    own = {path: count for path, count in folders.items() if not set(path.relative_to(HOUSE).parts) & NOT_OURS}
    assert {named(path): count for path, count in own.items() if count > CROWDED} == {}


def test_the_folders_around_the_packages_are_no_packages() -> None:
    """A package called ``kernels`` belongs to another project, which transformers imports."""
    assert not (HOUSE / "kernels" / "__init__.py").exists()
    assert not (HOUSE / "bindings" / "__init__.py").exists()
    assert list((HOUSE / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted(p for folder in ("tests", "bench") for p in (HOUSE / folder).rglob("*.py"))], ids=named
)
def test_every_file_is_short_and_says_in_one_sentence_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    doc = ast.get_docstring(ast.parse(text))
    assert doc, "the file has no docstring"
    first = doc.split("\n\n")[0].replace("\n", " ")
    assert first.endswith("."), first
    # A stop followed by a capital would begin a second sentence.
    assert not re.search(r"[a-z)`]\. [A-Z]", first), first


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_inv12_no_source_can_read_pickle(path: Path) -> None:
    assert pickle_readers(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from joblib import load", "torch.load(f)", "np.load(f)"),
        *("dist.all_gather_object(out, x)", "from torch.distributed.launcher.api import elastic_launch"),
        "AutoModel.from_pretrained(name, trust_remote_code=given)",
    ],
)
def test_inv12_the_search_finds_a_pickle_reader(source: str) -> None:
    assert pickle_readers(ast.parse(source))
    assert not pickle_readers(ast.parse("torch.load(f, weights_only=True); np.load(f, allow_pickle=False)"))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "say.py"], ids=named)
def test_text_reaches_the_terminal_through_one_door(path: Path) -> None:
    assert loose_words(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    ["print(name)", "typer.echo(f'{x}')", "self.console.print(text, markup=False)", "sys.stderr.write(str(error))"],
)
def test_the_search_finds_loose_words(source: str) -> None:
    assert loose_words(ast.parse(source))
    fine = "print('done'); typer.echo(json.dumps(x, indent=2)); console.print(Text(visible(name), style='dim'))"
    assert not loose_words(ast.parse(fine))


def test_html_is_written_by_one_template_and_markup_made_in_one_place() -> None:
    made = [
        named(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("Markup", "mark_safe")
    ]
    assert made == ["fedmoe_core/reporting/drawing.py"]
    (template,) = (HOUSE / "fedmoe_core").rglob("*.jinja")
    text = template.read_text("utf-8")
    assert re.findall(r"\{\{[^}]*\|\s*safe\b[^}]*\}\}", text) == []
    assert not re.search(r"autoescape|<script|\bon\w+=", text)


def declared(path: Path | None = None) -> set[str]:
    """What every install has, and where a binding or a room of the core has an extra's name, what the extra adds."""
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text("utf-8"))["project"]
    extras: tuple[str, ...] = ()
    if path is not None and package_of(path) == "fedmoe_bindings":
        extras = (path.parent.name, path.stem)
    elif path is not None and package_of(path) == "fedmoe_core":
        extras = tuple(module_of(path).split(".")[1:2])
    listed = project["dependencies"] + [
        line for name in extras for line in project["optional-dependencies"].get(name, [])
    ]
    return {re.split(r"[^\w.-]", line)[0].lower() for line in listed}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_what_is_imported_is_declared(path: Path) -> None:
    assert undeclared(ast.parse(path.read_text()), declared(path)) == set()


def test_the_search_finds_what_is_not_declared() -> None:
    tree = ast.parse("import os, numpy as np\ndef late():\n    from sklearn.cluster import KMeans\n    import requests")
    assert undeclared(tree, {"numpy"}) == {"scikit-learn", "requests"}
    assert {"torch", "filelock", "jinja2"} <= declared()


@pytest.mark.parametrize("path", [*SOURCES, *sorted((HOUSE / "bench").rglob("*.py"))], ids=named)
def test_plain_english(path: Path) -> None:
    assert [f"{named(path)}:{found}" for found in riddles(path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        '"""A file that is\n    no checkpoint."""',
        'raise ValueError(f"{path} is no JSON object")',
        "x = 1  # made anew for whoever asks",
        'help = "half way in place of the end"',
    ],
)
def test_the_search_finds_a_riddle(source: str) -> None:
    assert riddles(source)
    assert not riddles(
        '"""There is no GPU here, which is no longer an error; a place of its own."""  # instead of none'
    )


def test_the_readme_is_a_landing_page() -> None:
    """Nobody reads 2,000 words before the first command; what is longer belongs to docs/."""
    assert len((HOUSE / "README.md").read_text().split()) <= 900
