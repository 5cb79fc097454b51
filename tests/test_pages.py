"""Every command line and every Python block that a page prints is parsed to its end or run, so that no page can rot."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from fedmoe_core.cli import main
from fedmoe_core.comparison.study import Study
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import ALGORITHMS

HOUSE = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in (*HOUSE.glob("*.md"), *HOUSE.glob("docs/**/*.md"), HOUSE / "bench/README.md")
    if path.name != "CHANGELOG.md"  # tells what commands once did
)
TARGETS = re.findall(r"^([a-z0-9.-]+):.*##", (HOUSE / "Makefile").read_text(), re.MULTILINE)
# Words of a line that is a command. What these begin is checked below; anything else in a shell block fails the test.
# Nothing of ours to check.
ELSEWHERE = ("git", "cd", "open", "source", "export", "mkdir", "openssl", "printf", "ssh-keygen")
STARTS = ("make", "fedmoe", "python", "python3", "pip", "bash", "torchrun", "mkdocs", *ELSEWHERE)
# What a reader replaces, as something of its kind.
PLACEHOLDERS = {"NAME": "hfedmoe", "SYSTEMS": "hfedmoe", "CORES": "2"}
SHELL = ("bash", "sh", "shell", "console", "text", "")


@dataclass(frozen=True)
class Command:
    """One command line of a page."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(HOUSE)}:{self.line}: {' '.join(self.words)}"


def fences(text: str) -> Iterator[tuple[str, int, str]]:
    """Language, first line and content of every fenced block."""
    for match in re.finditer(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield match[2], text[: match.start()].count("\n") + 2, textwrap.dedent(match[3])


def without_fences(text: str) -> str:
    """The text with fenced blocks blanked, line numbers kept."""
    return re.sub(r"^( *)```.*?^\1```", lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


def joined(block: str, first: int) -> Iterator[tuple[int, str]]:
    """Lines of a shell block, continued ones as one, prompts and comments gone."""
    held, begin = "", first
    for number, line in enumerate(block.splitlines(), first):
        held, begin = (held + " " + line.strip(), begin) if held else (line.strip().removeprefix("$ "), number)
        if held.endswith("\\"):
            held = held[:-1].rstrip()
            continue
        yield begin, held
        held = ""


def lines_of(page: Path) -> Iterator[tuple[int, str, bool]]:
    """Candidate command lines of a page, with whether they stand in a shell block, where all lines must be commands."""
    text = page.read_text()
    for language, first, block in fences(text):
        if language in SHELL:
            yield from ((number, line, language in ("bash", "sh", "shell")) for number, line in joined(block, first))
    rest = without_fences(text)
    indented = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
    for match in indented.finditer(rest):
        first = rest[: match.start()].count("\n") + 1
        yield from ((number, line, False) for number, line in joined(match[0], first))
    for match in re.finditer(r"`([^`\n]+)`", indented.sub(lambda m: "\n" * m[0].count("\n"), rest)):
        yield rest[: match.start()].count("\n") + 1, match[1], False


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for number, line, all_are in lines_of(page):
            words = split(line)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]  # variables of the command's own
            if not words:
                continue
            head = words[0].removeprefix(".venv/bin/")
            if head in STARTS and (len(words) > 1 or all_are):
                found.append(Command(page, number, (head, *words[1:])))
            elif all_are:
                pytest.fail(f"{page.name}:{number}: {line!r} begins with no command that this test knows")
    return found


def split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


COMMANDS = commands()


def test_the_search_sees_the_pages_and_their_commands() -> None:
    assert {path.name for path in PAGES} >= {"README.md", "CONTRIBUTING.md", "study.md"}
    heads = {command.words[0] for command in COMMANDS}
    assert heads >= {"make", "fedmoe", "python", "bash"}
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] not in ELSEWHERE], ids=str)
def test_a_printed_command_is_understood_to_its_end(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HOUSE)
    head, *words = command.words
    {
        "make": check_make,
        "fedmoe": check_fedmoe,
        "python": check_python,
        "python3": check_python,
        "pip": check_pip,
        "bash": check_bash,
        "torchrun": check_torchrun,
        "mkdocs": lambda words: None if words[0] in ("build", "serve") else pytest.fail(f"mkdocs {words[0]}"),
    }[head](words)


def check_make(words: list[str]) -> None:
    goals = [word for word in words if "=" not in word]
    assert goals, words
    for goal in goals:
        assert goal in TARGETS, f"the Makefile has no target {goal}"
    done = subprocess.run(
        ["make", "--dry-run", "--warn-undefined-variables", *words], cwd=HOUSE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "undefined variable" not in done.stderr


def check_fedmoe(words: list[str]) -> None:
    if words[0].startswith("-"):
        assert words in (["--help"], ["--version"], ["-h"]), words
        return
    group = typer.main.get_command(main.app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    verb = group.commands.get(words[0])  # type: ignore[attr-defined]
    assert verb is not None, f"fedmoe has no command {words[0]}"
    if words[1:] and "--help" not in words:  # a verb alone, such as in a sentence, only has to exist
        check_words(words[0], verb.make_context(words[0], [PLACEHOLDERS.get(word, word) for word in words[1:]]).params)


def check_words(verb: str, parsed: dict[str, Any]) -> None:
    """What stands after the options: a configuration that loads, files that exist, systems that there are."""
    settings = parsed.get("words") or []
    if verb in ("simulate", "plan", "score"):
        main._config(settings)
    elif verb == "compare":
        variants = parsed["variants"]
        named = tomllib.loads(Path(variants).read_text())["systems"] if variants else {}
        assert set(parsed["systems"].split(",")) <= {*named, *ALGORITHMS, "all"}, parsed["systems"]
        assert parsed["beside"] is None or Path(parsed["beside"]).is_file() or str(parsed["beside"]).startswith("runs/")
        Study.of(
            settings,
            systems=parsed["systems"],
            seeds=parsed["seeds"],
            out=Path("runs/x"),
            variants=Path(variants) if variants else None,
        ).jobs()
    else:
        assert verb in ("resume", "report", "systems", "export", "split", "watch"), f"teach this test what {verb} reads"


def check_python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1]) is not None or words[1] == "venv", words
        return
    if words[:1] in (["-c"], ["-"]):
        compile(words[1], "<page>", "exec")
        return
    script = HOUSE / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    compile(script.read_text(), str(script), "exec")
    named = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    if not named:
        return
    usage = usage_of(script)
    for option in named:
        assert re.search(rf"{re.escape(option)}\b", usage), f"{words[0]} has no option {option}"


@cache
def usage_of(script: Path) -> str:
    """What the script says of its options; one start of Python for all lines that name it."""
    paths = [str(HOUSE / part) for part in ("kernels", "bindings", ".", "bench")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HOUSE, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("verb", choices=("install", "wheel"))
    parser.add_argument("what", nargs="*")
    for flag in ("-e", "-r", "-c", "--wheel-dir", "-w"):
        parser.add_argument(flag)
    for flag in ("--no-deps", "--no-build-isolation"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_intermixed_args(words)
    for what in [*asked.what, asked.e or ""]:
        named = re.fullmatch(r"(\.|fedmoe-core)\[(.+)\]", what)
        assert named is None or set(named[2].split(",")) <= set(extras), what


def check_bash(words: list[str]) -> None:
    script = HOUSE / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


def check_torchrun(words: list[str]) -> None:
    at = words.index("fedmoe_core.cli")
    check_fedmoe(words[at + 1 :])


PYTHON_BLOCKS = {
    page: [block for language, _, block in fences(page.read_text()) if language == "python"] for page in PAGES
}


@pytest.mark.parametrize("page", [page for page, blocks in PYTHON_BLOCKS.items() if blocks], ids=lambda p: p.name)
def test_the_python_of_a_page_runs_as_printed_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(PYTHON_BLOCKS[page]))
    paths = [str(HOUSE / part) for part in ("kernels", "bindings", ".")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_configurations_that_pages_print_load(tmp_path: Path) -> None:
    for page in PAGES:
        for language, line, block in fences(page.read_text()):
            if language == "toml":
                path = tmp_path / "printed.toml"
                path.write_text(block)
                try:
                    if {"systems", "project", "superlink"} & set(tomllib.loads(block)):
                        continue  # a comparison's variants, a line of a pyproject.toml, or a configuration of Flower's
                    Config.load(path)
                except ValueError as error:
                    pytest.fail(f"{page.name}:{line}: {error}")


@pytest.mark.parametrize("path", [*HOUSE.glob("*.md"), *sorted(HOUSE.glob("docs/**/*.md"))], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_fences(path.read_text())):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists() or generated(path, target), f"{path.name} links to {target}"


def generated(path: Path, target: str) -> bool:
    """Pages that the site makes from the code when it is built."""
    return "docs" in path.parts and (path.parent / target).resolve().name in (
        "systems.md",
        "configuration.md",
        "devices.md",
    )
