"""Hooks of mkdocs: pages made from the code, and the files outside ``docs/`` that the pages link to.

A page may link to any file of the repository by its relative path, so that the link also works where the repository is
browsed. The site carries each such file; a link to a folder becomes plain text there.
"""

from __future__ import annotations

import ast
import inspect
import io
import logging
import os
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
HOUSE = DOCS.parent
sys.path[:0] = [str(HOUSE / folder) for folder in (".", "kernels", "bindings")]  # this checkout, installed or not

from fedmoe_core.algorithms.base import algorithm_class  # noqa: E402
from fedmoe_core.base import show  # noqa: E402
from fedmoe_core.budget.devices import COMPUTE_SECONDS, COMPUTE_SHARE, DEVICES, LINK_SECONDS  # noqa: E402
from fedmoe_core.config.run_config import CLASSIFICATION_DEFAULTS, DENSE_DEFAULTS, Config, flatten  # noqa: E402
from fedmoe_core.config.schema import schema_of, write_toml  # noqa: E402
from fedmoe_core.config.systems import PLACES, TAGS, System  # noqa: E402

# Files of the repository that are pages of the site, under the site's names.
CARRIED = {
    "contributing.md": HOUSE / "CONTRIBUTING.md",
    "changelog.md": HOUSE / "CHANGELOG.md",
    "security.md": HOUSE / "SECURITY.md",
    "bench.md": HOUSE / "bench" / "README.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.generate")  # a warning of a hook ends a strict build


def meanings(record: type) -> dict[str, str]:
    """What the comments on a dataclass's fields say, by field: at the end of its line or alone on the line before."""
    source = inspect.getsource(record)
    comments: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").rstrip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for item in body.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        first = item.lineno
        while first - 1 in alone:
            first -= 1
        lines = range(first, (item.end_lineno or item.lineno) + 1)
        found[item.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def sections() -> Iterator[tuple[str, type]]:
    """The sections of a configuration, ``""`` first, with the dataclass that holds each."""
    yield "", Config
    for name, hint in get_type_hints(Config).items():
        if is_dataclass(hint):
            yield name, hint  # type: ignore[misc]


def configuration_page() -> str:
    """Every key of a configuration: what it may be, what it is by default, and what it means."""
    schema, values = schema_of(Config), flatten(Config())
    lines = [
        "# Configuration",
        "",
        "Every setting of a run, made from the code. Write it in a TOML file, or as `key=value` on the command line.",
        "The command line wins over the file. Keys below a heading such as `[train]` stand in that table of the file;",
        "on the command line write `train.lr=1e-3`. An unknown key is refused, and the nearest one named.",
        "",
        "Labelled data (a CSV, or JSON Lines with a `label`) starts from some other values. They stand behind the word",
        "*labelled*. So does a dense model (`smollm2`, `dense:DIR`), behind the word *dense*. `eq.` is",
        "an equation of [HFedMoE](https://arxiv.org/abs/2601.00583), unless the table belongs to another system.",
    ]
    for section, record in sections():
        meant = meanings(record)
        title, about = (f"[{section}]", inspect.getdoc(record) or "") if section else ("At the top", "")
        lines += ["", f"## {title} {{ #{section or 'top'} }}", "", about.replace("``", "`")]
        lines += ["", "| key | what it may be | default | meaning |", "| --- | --- | --- | --- |"]
        for key, setting in schema.items():
            if key.rpartition(".")[0] != section:
                continue
            default = f"`{_toml(key, values[key])}`"
            if key in CLASSIFICATION_DEFAULTS:
                default += f"<br>*labelled*: `{_toml(key, CLASSIFICATION_DEFAULTS[key])}`"
            if key in DENSE_DEFAULTS:
                default += f"<br>*dense*: `{_toml(key, DENSE_DEFAULTS[key])}`"
            bound, leaf = str(setting).removeprefix("a "), key.rpartition(".")[2]
            lines.append(f"| `{key}`{{ #{key} }} | {bound} | {default} | {_cell(meant[leaf])} |")
    return "\n".join(lines) + "\n"


def systems_page() -> str:
    """Every system: its paper, the equations implemented, how sure we are of each, and what is not there."""
    cards: list[System] = [algorithm_class(name).card for name in PLACES]
    lines = [
        "# Systems",
        "",
        "A system is a way to plan, train and average. Its name is the value of the key `algorithm`. This page is what",
        "`fedmoe systems` prints. Each equation has a tag that says how sure we are of it:",
        "",
        "| tag | the formula is |",
        "| --- | --- |",
        *(f"| {tag} | {meaning} |" for tag, meaning in TAGS.items()),
        "",
        "| name | system | equations | departures | missing |",
        "| --- | --- | --- | --- | --- |",
    ]
    for card in cards:
        counts = len(card.equations), len(card.approximated), len(card.missing)
        lines.append(f"| [`{card.name}`](#{card.name}) | {card.title} | {' | '.join(map(str, counts))} |")
    for card in cards:
        lines += ["", f"## {card.title} {{ #{card.name} }}", "", f"`algorithm={card.name}`, {card.paper}.", ""]
        lines += ["| equation | tag | what it says |", "| --- | --- | --- |"]
        lines += [f"| {_cell(e.number)} | {e.tag} | {_cell(e.what)} |" for e in card.equations]
        for title, sentences in (("Departs from the paper", card.approximated), ("Not there", card.missing)):
            if sentences:
                lines += ["", f"**{title}**", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"


def devices_page() -> str:
    """The device profiles that a budget may name."""
    lines = [
        "# Devices",
        "",
        "A device profile turns a piece of hardware into a budget. Its name is a budget: `budgets=phone-8gb`.",
        "Data sheets state rates, a budget needs amounts per round. So each profile assumes that a round may take",
        f"{COMPUTE_SECONDS / 60:.0f} minutes of arithmetic at {COMPUTE_SHARE:.0%} of the peak rate, and "
        f"{LINK_SECONDS:.0f} seconds of the link each way.",
        "",
        "A profile that knows its power counts energy too: operations at that rate, and the link's joules per byte. ",
        "Write a limit behind its name: `phone-8gb,energy=30J`. Orders of magnitude: measure yours.",
        "",
        "The same rates predict the virtual seconds of a client's round: bytes down, operations, bytes up, each by its",
        "rate. The peak of the `tiny` devices is there for that alone. See [Time](guides/time.md).",
        "",
        "| name | memory | FLOPs a round | bytes down | bytes up | time of 1 GFLOP | of 1 MB down | of 1 MB up |"
        " power | energy of 1 GFLOP | of 1 MB |",
        f"|{' --- |' * 11}",
    ]
    for device in DEVICES:
        limits = (
            show.size(device.usable_bytes),
            "no limit" if device.round_flops is None else show.flops(device.round_flops),
            "no limit" if device.round_down is None else show.size(device.round_down),
            "no limit" if device.round_up is None else show.size(device.round_up),
            *(
                "none" if rate is None else f"{work / rate:.2g} s"
                for work, rate in ((1e9, device.reached_flops), (8e6, device.down_bits), (8e6, device.up_bits))
            ),
            *(
                ("not known",) * 3
                if device.watts is None
                else (
                    f"{device.watts:g} W",
                    f"{1e9 * device.joules_per_flop:.2g} J",
                    f"{1e6 * device.joules_per_byte:.2g} J",
                )
            ),
        )
        lines.append(f"| `{device.name}` | {' | '.join(limits)} |")
    lines += ["", "## Sources", "", "| name | from | assumed |", "| --- | --- | --- |"]
    lines += [f"| `{device.name}` | {_cell(device.source)} | {_cell(device.assumed)} |" for device in DEVICES]
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration_page, "systems.md": systems_page, "devices.md": devices_page}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made from the code, the carried ones, and every file that a page links to."""
    from mkdocs.structure.files import File

    for uri, make in PAGES.items():
        files.append(File.generated(config, uri, content=make()))
    for uri, path in CARRIED.items():
        files.append(File.generated(config, uri, content=path.read_text("utf-8")))
    waiting = {uri: _source(uri) for uri in (file.src_uri for file in files.documentation_pages()) if uri not in PAGES}
    while waiting:
        _, source = waiting.popitem()
        for target in _targets(source):
            carried = _uri(target)
            if carried is None or not carried.startswith("repository/") or files.get_file_from_path(carried):
                continue
            files.append(File.generated(config, carried, abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting[carried] = target
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at what the site carries."""
    uri = page.file.src_uri
    if uri in PAGES:
        return markdown
    source = _source(uri)

    def pointed(match: re.Match[str]) -> str:
        image, label, path, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
        if ":" in path:
            return match.group()
        target = (source.parent / path).resolve()
        if target.is_dir():
            return label
        goal = _uri(target)
        if goal is None:
            log.warning("%s links to %s, which is not there", source.relative_to(HOUSE), path)
            return match.group()
        return f"{image}[{label}]({os.path.relpath(goal, Path(uri).parent)}{anchor})"

    return LINK.sub(pointed, markdown)


def _source(uri: str) -> Path:
    """The file of the repository behind a page."""
    if uri.startswith("repository/"):
        return HOUSE / uri.removeprefix("repository/")
    return CARRIED.get(uri, DOCS / uri)


def _targets(source: Path) -> Iterator[Path]:
    """Files that a Markdown file links to."""
    for match in LINK.finditer(source.read_text("utf-8")):
        if ":" not in match.group(3):
            target = (source.parent / match.group(3)).resolve()
            if target.is_file():
                yield target


def _uri(target: Path) -> str | None:
    """Where the site has a file of the repository; None where there is no such file."""
    pages: Mapping[Path, str] = {path: uri for uri, path in CARRIED.items()} | {HOUSE / "README.md": "index.md"}
    if target in pages:
        return pages[target]
    if target.is_relative_to(DOCS):
        uri = target.relative_to(DOCS).as_posix()
        return uri if uri in PAGES or target.is_file() else None
    if target.is_file() and target.is_relative_to(HOUSE):
        return f"repository/{target.relative_to(HOUSE).as_posix()}"
    return None


def _toml(key: str, value: Any) -> str:
    """A value as a TOML file would have it."""
    return write_toml({key: value}, schema_of(Config)).rstrip("\n").rpartition("\n")[2].partition(" = ")[2]


def _cell(text: str) -> str:
    """Text for a cell of a table; ``|`` would end it."""
    return text.replace("``", "`").replace("|", "&#124;")
