"""No name, label or message moves the cursor, sets a title or hides a word on the user's terminal."""

from __future__ import annotations

import io
import json
import os
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_rows import ROW
from rich.console import Console
from synthetic_run import make_run
from typer.testing import CliRunner

from fedmoe_core.cli import main
from fedmoe_core.cli import study as cli_study
from fedmoe_core.comparison import compare
from fedmoe_core.comparison.run_figures import figures_of
from fedmoe_core.comparison.table import markdown, rows_of
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.simulation import launch
from fedmoe_core.simulation.progress import observer_for

TITLE = "\x1b[2J\x1b]0;pwned\x07"
EVIL = f"{TITLE}\r\x9b31m\u202e\u2028[red]x[/red][/]"
SEEN = "\\x1b[2J\\x1b]0;pwned\\x07\\x0d\\x9b31m\\u202e\\u2028[red]x[/red][/]"
LONE = os.fsdecode(b"\xff\xfe")  # of a file name that is not UTF-8; print() raises on it


def clean(text: str) -> str:
    """The text, in which only the newline controls anything."""
    bad = {
        sign for sign in text if (ord(sign) < 32 and sign != "\n") or 127 <= ord(sign) < 160 or sign in "\u202e\u2028"
    }
    assert not bad, text
    return text


def said(*words: str, status: int = 0) -> tuple[str, str]:
    """What the command prints on stdout and on stderr, as bytes that a terminal would get, decoded."""
    result = CliRunner().invoke(main.app, list(words), env={"COLUMNS": "400"})
    assert result.exit_code == status, (result.output, result.exception)
    return clean(result.stdout_bytes.decode()), clean(result.stderr_bytes.decode())


def hostile_run(path: Path, **changes: Any) -> Path:
    """A run whose label, data, client names, labels and reasons are hostile."""
    make_run(path, clients=3, layers=1, experts=2, rounds=2, label=f"L{EVIL}", over_budget=[EVIL], **changes)
    partition = json.loads((path / "partition.json").read_text("utf-8"))
    partition |= {"clients": [f"{EVIL}{n}" for n in range(3)], "names": [f"{EVIL}{n}" for n in range(3)]}
    (path / "partition.json").write_text(json.dumps(partition), "utf-8")
    return path


def tell(observer: Any) -> None:
    """What a simulator tells its observer, with a hostile name wherever there is one."""
    failed = {"tier": EVIL, "status": "failed", "error": EVIL}
    refused = [{"client": 1, "reason": EVIL + LONE}]
    observer.on_start({"label": EVIL, "model": EVIL, "data": LONE, "rounds": 1, "clients_per_round": 2})
    observer.on_stage(f"warm-up of {EVIL}")
    for done in range(5):
        observer.on_progress(f"stage {EVIL}", done, 4)
    observer.on_client(1, 0, failed)
    observer.on_client(1, 1, {**failed, "status": "ok"})
    observer.on_round(1, 1, {"loss": 4.0, "refused": refused})
    observer.on_end({})
    observer.close()


@pytest.mark.parametrize("broken", [2, 0])
def test_simulate_and_its_observer(simulator: Any, tmp_path: Path, broken: int) -> None:
    def run(config: Any, *, observer: Any, force: bool) -> dict[str, Any]:
        tell(observer or observer_for(Console(stderr=True)))  # as the simulator does where none is given
        found = {"budget_violations": 2, "budgets_broken": broken, "broken_by": [EVIL]}
        path = hostile_run(Path(config.out), budgeted=bool(broken), **found)
        return json.loads((path / "summary.json").read_text("utf-8"))

    simulator.run = run
    out, err = said("simulate", f"out={tmp_path}/a{EVIL.replace('/', '')}", status=int(broken > 0))
    assert f"L{SEEN}: held-out loss" in out
    assert f"refused client 1: {SEEN}\\udcff\\udcfe" in err
    assert bool(broken) == ("budgets were exceeded 2 times (" + SEEN[:9] in err)
    out, _ = said("simulate", f"out={tmp_path}/json", "--json", status=int(broken > 0))
    assert json.loads(out)["label"] == f"L{EVIL}"


@pytest.mark.parametrize("terminal", [True, False])
def test_observers(terminal: bool) -> None:
    out = io.StringIO()
    tell(observer_for(Console(file=out, force_terminal=terminal, width=400)))
    text = out.getvalue()
    assert SEEN in text
    assert not any(code in text for code in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\u202e", LONE))
    if not terminal:
        clean(text)


def test_report_of_one_and_of_several(simulator: Any, tmp_path: Path) -> None:
    one = hostile_run(tmp_path / "plain").rename(tmp_path / f"{LONE}{TITLE}")
    two = hostile_run(tmp_path / f"b{TITLE}")
    out, _ = said("report", str(one))
    assert f"L{SEEN}: held-out loss" in out
    assert "report: " in out
    assert "\\udcff\\udcfe\\x1b[2J" in out
    out, _ = said("report", str(one), str(two), "--out", str(tmp_path / f"{EVIL.replace('/', '')}.html"))
    assert f"L{SEEN}, \\udcff\\udcfe\\x1b[2J" in out


def test_watch_of_one_and_of_several(tmp_path: Path) -> None:
    one = hostile_run(tmp_path / "plain", tiers=(TIER, "experts=25%")).rename(tmp_path / f"{LONE}{TITLE}")
    config = (one / "config.toml").read_text("utf-8").replace('"experts=25%"', json.dumps(EVIL))
    (one / "config.toml").write_text(config.replace('model = "tiny"', f"model = {json.dumps(EVIL)}"), "utf-8")
    lines = (one / "metrics.jsonl").read_text("utf-8").replace("loss is NaN at step 3", json.dumps(EVIL)[1:-1])
    (one / "metrics.jsonl").write_text(lines.replace('"status": "failed"', f'"status": {json.dumps(EVIL)}'), "utf-8")
    out, _ = said("watch", str(one), "--once")
    assert f"HFedMoE: {SEEN} on stdlib" in out
    assert f"{SEEN}  " in out  # the tier
    assert f"{SEEN} 1, client 2, round 2: {SEEN}" in out
    out, _ = said("watch", str(one), str(hostile_run(tmp_path / "b")), "--once")
    assert "\\udcff\\udcfe\\x1b[2J" in out
    said("watch", str(one), "--json")
    (one / "summary.json").unlink()
    assert "stopped; there is no checkpoint yet, start again" in said("watch", str(one))[0]


def test_plan_shows_names_as_they_are(simulator: Any) -> None:
    names = ("[red]x[/red]", "[/]", ":bomb:", EVIL, LONE)
    rows = [replace(ROW, client=name, budget=replace(ROW.budget, name=f"t{name}")) for name in names]
    simulator.dry_run = lambda config: rows
    out, _ = said("plan", f"data=csv:{TITLE}[/]")
    for shown in ("[red]x[/red]", " [/] ", ":bomb:", SEEN[:12], "t\\udcff\\udcfe"):
        assert shown in out
    assert "\\x1b[2J\\x1b]0;pwned\\x07[/], first round" in out
    out, _ = said("plan", "--json")
    assert [client["client"] for client in json.loads(out)["clients"]] == list(names)
    simulator.dry_run = lambda config: [
        replace(ROW, client=EVIL, budget=replace(ROW.budget, memory_bytes=1, name=EVIL))
    ]
    assert "1 client cannot run; \\x1b[2J\\x1b]0;pwned" in said("plan", status=2)[1]


def test_errors(simulator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raises(error: Exception) -> None:
        def run(config: Any, *, observer: Any, force: bool) -> dict[str, Any]:
            raise error

        simulator.run = run

    assert "\\x1b[2J" in said("report", f"{tmp_path}/{TITLE}", status=2)[1]
    assert "\\udcff" in said("report", f"{tmp_path}/{LONE}", status=2)[1]
    for words in ((f"--{TITLE}",), ("report", f"--{TITLE}"), (TITLE,), ("compare", "--workers", TITLE)):
        said(*words, status=2)  # typer's own errors
    assert "\\x1b[2J" in said("simulate", f"{TITLE}=1", status=2)[1]
    for error in (ValueError(EVIL), FileNotFoundError(2, "No such file", LONE + TITLE)):
        raises(error)
        assert "\\x1b[2J" in said("simulate", f"out={tmp_path}/run", status=2)[1]
    raises(launch.RankError(EVIL, 3))
    assert SEEN in said("simulate", f"out={tmp_path}/run", status=3)[1]

    def stopped(config: Any, *, observer: Any, force: bool) -> dict[str, Any]:
        (Path(config.out) / "checkpoint" / "x").mkdir(parents=True)
        raise KeyboardInterrupt

    simulator.run = stopped
    assert "go on with: fedmoe resume" in said("simulate", f"out={tmp_path}/{TITLE}", status=130)[1]


def test_compare_prints_its_table_and_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = (f"a{EVIL}", f"b|<script>`{LONE}")
    runs = {
        label: [
            figures_of(read_runs([make_run(tmp_path / f"{n}", seed=n, clients=2, rounds=1, tiers=(TIER,))])[0], label)
        ]
        for n, label in enumerate(labels)
    }
    job = types.SimpleNamespace(name=EVIL + LONE)

    def compared(study: Any, watch: Any, *, force: bool) -> Any:
        watch(types.SimpleNamespace(error=EVIL, job=job, cached=False, seconds=1.0), 2.0)
        lines = markdown(rows_of(runs, target=4.0))
        return compare.StudyResult(missing=[job], problems=[f"trouble {EVIL}"], lines=lines, notes=[f"note {EVIL}"])

    monkeypatch.setattr(compare, "compare", compared)
    study: Any = types.SimpleNamespace(jobs=lambda: [job])
    assert cli_study.run(study, Console(stderr=True, width=400), force=False) == 1
    out, err = map(clean, capsys.readouterr())
    assert "b\\|&lt;script&gt;\\`\\udcff" in out
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in table[:4]} == {table[0].count("|")}
    assert f"note: note {SEEN}" in err
    assert f"error: trouble {SEEN}" in err
    assert f"1/1, {SEEN}\\udcff\\udcfe: failed: {SEEN}" in err
    assert f"1 run still missing ({SEEN}" in err


TIER = "memory=24MiB"
