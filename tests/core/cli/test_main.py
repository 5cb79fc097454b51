"""The command: exit codes, one sentence per error, and a run that can be stopped and resumed."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_rows import ROW
from rich.console import Console
from synthetic_run import make_run
from typer.testing import CliRunner

from fedmoe_core.cli import main
from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import launch
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.progress import LineObserver, LiveObserver, observer_for


def invoke(*words: str) -> Any:
    return CliRunner().invoke(main.app, list(words))


def writes_a_run(calls: list[Any], **changes: Any) -> Callable[..., dict[str, Any]]:
    def run(config: Config, *, observer: Any, force: bool) -> dict[str, Any]:
        calls.append((config, force))
        out = Path(config.out)
        make_run(out, rounds=2, clients=3, **changes)
        return json.loads((out / "summary.json").read_text())

    return run


def test_simulate_runs_resolved_and_prints_what_it_came_to(simulator: Any, tmp_path: Path) -> None:
    calls: list[Any] = []
    simulator.run = writes_a_run(calls)
    toml = tmp_path / "c.toml"
    toml.write_text("rounds = 3\n")
    result = invoke("simulate", str(toml), "train.lr=1e-3", f"out={tmp_path}/run")
    assert result.exit_code == 0, result.output
    config, force = calls[0]
    assert (config.rounds, config.train.lr, force) == (3, 1e-3, False)
    assert config.threads >= 1
    assert "held-out loss 4." in result.stdout
    assert "budgets exceeded: 0" in result.stdout
    assert (tmp_path / "run" / "report.html").is_file()


def test_simulate_json_is_the_summary_and_nothing_else(simulator: Any, tmp_path: Path) -> None:
    simulator.run = writes_a_run([])
    result = invoke("simulate", f"out={tmp_path}/run", "--json", "--quiet")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_existing_run_is_kept_unless_forced(simulator: Any, tmp_path: Path) -> None:
    calls: list[Any] = []
    simulator.run = writes_a_run(calls)
    words = ("simulate", f"out={tmp_path}/run")
    assert invoke(*words).exit_code == 0
    refused = invoke(*words)
    assert refused.exit_code == 2
    assert f"fedmoe resume {tmp_path}/run" in refused.stderr
    assert "--force" in refused.stderr
    assert len(calls) == 1
    assert invoke(*words, "--force").exit_code == 0
    assert calls[1][1] is True


def test_force_never_overwrites_what_is_not_a_run(simulator: Any, tmp_path: Path) -> None:
    simulator.run = writes_a_run([])
    (tmp_path / "precious.txt").write_text("mine")
    result = invoke("simulate", f"out={tmp_path}", "--force")
    assert result.exit_code == 2
    assert "fedmoe did not make it" in result.stderr
    assert "--force" not in result.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert "is not a directory" in invoke("simulate", f"out={tmp_path}/file").stderr


def test_a_broken_budget_or_an_idle_run_ends_with_1_and_a_sentence(simulator: Any, tmp_path: Path) -> None:
    broken = {"budgets_broken": 2, "broken_by": ["client 1: memory: 2 B used, 1 B allowed"], "budget_violations": 2}
    simulator.run = writes_a_run([], **broken)
    result = invoke("simulate", f"out={tmp_path}/a")
    assert result.exit_code == 1
    assert "error: budgets were exceeded 2 times (client 1: memory: 2 B used, 1 B allowed)" in result.stderr
    assert "budgets exceeded: 2 (client 1: memory: 2 B used" in result.stdout
    simulator.run = writes_a_run([], nothing_trained="all 6 updates failed or were refused; client 0 in round 1: nan")
    result = invoke("simulate", f"out={tmp_path}/b", "--json")
    assert (result.exit_code, json.loads(result.stdout)["rounds"]) == (1, 2)
    assert "error: nothing trained: all 6 updates failed" in result.stderr
    assert f"{tmp_path}/b/ledger.jsonl" in result.stderr


def test_a_run_that_no_budget_binds_is_not_a_failed_one(simulator: Any, tmp_path: Path) -> None:
    over = {"budget_violations": 2, "budgeted": False, "budgets_broken": 0, "over_budget": ["client 0: more"]}
    simulator.run = writes_a_run([], **over)
    result = invoke("simulate", f"out={tmp_path}/b")
    assert result.exit_code == 0
    assert "not bound by the budgets (client 0: more)" in result.stdout
    assert "budgets exceeded" not in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["simulate", "roundz=3"], "did you mean 'rounds'"),
        (["simulate", "rounds=0"], "at least 1"),
        (["simulate", "nothing.toml"], "does not exist"),
        (["simulate", "a.toml", "b.toml"], "two config files"),
        (["simulate", "rounds"], "neither key=value nor"),
        (["plan", "model_config.top_k=99"], "exceeds model_config.experts"),
        (["resume", "nothing"], "no config.toml"),
        (["report", "nothing"], "not a directory"),
    ],
)
def test_bad_words_are_one_sentence_and_exit_code_2(simulator: Any, words: list[str], said: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("client 3: budget of 1 MiB holds no expert; give 5 MiB"), "holds no expert; give 5 MiB"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: permission denied; choose another out="),
        (
            FileNotFoundError(2, "No such file or directory", "n.csv"),
            "n.csv: no such file or directory; check the path",
        ),
        (OSError("checkpoint is truncated;\n  start again"), "checkpoint is truncated; start again"),
    ],
)
def test_errors_of_the_simulator_are_one_sentence(simulator: Any, tmp_path: Path, error: Exception, said: str) -> None:
    def run(config: Config, *, observer: Any, force: bool) -> dict[str, Any]:
        raise error

    simulator.run = run
    words = ("simulate", f"out={tmp_path}/run")
    result = invoke(*words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr
    assert not (tmp_path / "run").exists()
    assert invoke(*words, "--debug").exception is error


def test_a_defect_is_not_hidden(simulator: Any, tmp_path: Path) -> None:
    def run(config: Config, *, observer: Any, force: bool) -> dict[str, Any]:
        raise RuntimeError("a defect")

    simulator.run = run
    assert isinstance(invoke("simulate", f"out={tmp_path}/run").exception, RuntimeError)


@pytest.mark.parametrize("saved", [True, False])
def test_interrupt_names_the_way_to_go_on(simulator: Any, tmp_path: Path, saved: bool) -> None:
    def run(config: Config, *, observer: Any, force: bool) -> dict[str, Any]:
        if saved:
            (Path(config.out) / "checkpoint").mkdir(parents=True)
            (Path(config.out) / "checkpoint" / "round.safetensors").write_bytes(b"")
        raise KeyboardInterrupt

    simulator.run = run
    result = invoke("simulate", f"out={tmp_path}/run")
    assert result.exit_code == 130
    assert (f"fedmoe resume {tmp_path}/run" in result.stderr) == saved
    assert ("nothing to resume" in result.stderr) != saved


def test_resume_goes_on_and_reports(simulator: Any, tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", rounds=2, clients=3)
    seen: list[Path] = []

    def resume(run_dir: Path, *, observer: Any, other_code: bool) -> dict[str, Any]:
        seen.append(run_dir)
        return json.loads((run_dir / "summary.json").read_text())

    simulator.resume = resume
    result = invoke("resume", str(out))
    assert result.exit_code == 0, result.output
    assert seen == [out]
    assert "report:" in result.stdout


def test_plan_as_table_and_as_json(simulator: Any) -> None:
    simulator.dry_run = lambda config: [ROW, replace(ROW, client="email")]
    table = invoke("plan")
    assert table.exit_code == 0, table.output
    for word in ("asyncio", "email", "phone", "4+5 = 9", "20.0 MiB / 24.0 MiB", "30.0 GFLOP", "1.00 MiB / 2.00 MiB"):
        assert word in table.stdout
    told = json.loads(invoke("plan", "--json").stdout)
    assert told["fits"] is True
    assert told["clients"][0]["used"]["memory"] == ROW.predicted.memory_bytes


def test_plan_that_does_not_fit_is_an_error_after_the_table(simulator: Any) -> None:
    small = replace(ROW, budget=replace(ROW.budget, memory_bytes=1 << 20))
    simulator.dry_run = lambda config: [ROW, small]
    result = invoke("plan")
    assert result.exit_code == 2
    assert "phone" in result.stdout
    assert "1 client cannot run; asyncio: memory: 20.0 MiB (20971520 B) used, 1.00 MiB" in result.stderr
    told = invoke("plan", "--json")
    assert (told.exit_code, json.loads(told.stdout)["fits"]) == (2, False)


def test_other_ranks_say_nothing(simulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator.run = writes_a_run([])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("simulate", f"out={tmp_path}/run", "ranks=2")
    assert (result.exit_code, result.output) == (0, "")
    assert not (tmp_path / "run" / "report.html").exists()


def test_ranks_must_agree_with_torchrun(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = invoke("simulate", "ranks=2", "out=never")
    assert result.exit_code == 2
    assert "ranks=2 but torchrun started 3" in result.stderr


def test_ranks_outside_torchrun_are_started_with_the_same_words(
    simulator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(launch, "run_ranks", lambda words, **how: started.append((words, how)))
    result = invoke("simulate", f"out={tmp_path}/r", "ranks=2", "threads=1", "--quiet", "--force")
    assert result.exit_code == 0, result.output
    words, how = started[0]
    assert words == ["simulate", f"out={tmp_path}/r", "ranks=2", "threads=1", "--quiet", "--force"]
    assert how == {"ranks": 2, "threads": 1}


def run_command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the paths of this one."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    for name in ("RANK", "WORLD_SIZE"):
        env.pop(name, None)
    command = [sys.executable, "-m", "fedmoe_core.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_module_runs_and_help_needs_no_torch() -> None:
    done = run_command("simulate", "roundz=1")
    assert (done.returncode, done.stderr) == (2, "error: unknown key 'roundz'; did you mean 'rounds'?\n")
    # Nor the settings, which take a tenth of a second: the help answers in 0.22 s.
    script = "import sys, fedmoe_core.cli.main; print(*(name for name in sys.argv[1:] if name in sys.modules))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    heavy = ("torch", "matplotlib", "numpy", "filelock", "msgspec", "fedmoe_core.config.run_config", "typer")
    command = [sys.executable, "-c", script, *heavy]
    assert subprocess.run(command, env=env, timeout=60, check=True, capture_output=True, text=True).stdout == "typer\n"


def test_failed_rank_is_one_sentence_of_the_parent(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    with pytest.raises(launch.RankError, match=r"^unknown key 'roundz'; did you mean 'rounds'\?$") as error:
        launch.run_ranks(["simulate", "roundz=1"], ranks=2, threads=1)
    assert error.value.code == 2
    assert launch.LAUNCHED not in os.environ
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_warning_is_one_line_of_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", None)
    monkeypatch.setattr(main, "app", lambda prog_name: None)
    main.main()
    told = (UserWarning("weights are copied"), UserWarning, "somewhere.py", 7)
    assert warnings.formatwarning(*told) == "warning: weights are copied\n"
    monkeypatch.setenv("RANK", "1")
    assert warnings.formatwarning(*told) == ""


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"fedmoe-core": "9.9"}[name])
    assert invoke("--version").stdout == "fedmoe 9.9\n"

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    result = invoke("--version")
    assert (result.exit_code, "not installed" in result.stdout) == (0, True)


def records() -> list[tuple[str, tuple[Any, ...]]]:
    """What a simulator tells its observer in a short run with one failure."""
    client = {"tier": "phone", "loss_first": 4.4, "loss_last": 4.2, "status": "ok", "error": ""}
    failed = {**client, "status": "failed", "error": "loss is NaN at step 3"}
    first = {"loss": 4.31, "accuracy": None, "loss_clients": [4.3, 4.32], "refused": []}
    second = {
        **first,
        "loss": 4.25,
        "bytes_down_total": 1 << 20,
        "bytes_up_total": 1 << 20,
        "coverage": 0.5,
        "seconds": 3.0,
        "refused": [{"client": 1, "reason": "loss is NaN at step 3"}],
    }
    info = {"label": "HFedMoE", "model": "tiny", "data": "stdlib", "rounds": 1, "clients_per_round": 2}
    return [
        ("on_start", (info,)),
        ("on_stage", ("warm-up: 500 steps on 3.1 MB of public text",)),
        *(("on_progress", ("warm-up", done, 8)) for done in range(9)),
        ("on_round", (0, 1, first)),
        ("on_client", (1, 0, client)),
        ("on_client", (1, 1, failed)),
        ("on_round", (1, 1, second)),
        ("on_end", ({},)),
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_observers_tell_the_same_story(terminal: bool) -> None:
    out = io.StringIO()
    observer = observer_for(Console(file=out, force_terminal=terminal, width=200))
    assert isinstance(observer, LiveObserver if terminal else LineObserver)
    for name, args in records():
        getattr(observer, name)(*args)
    observer.close()
    said = out.getvalue()
    for words in (
        "HFedMoE: tiny on stdlib, 1 round, 2 clients a round",
        "warm-up: 500 steps",
        "held-out loss 4.310",
        "held-out loss 4.250 (−0.060)",
        "worst client 4.320",
        "moved 2.00 MiB",
        "experts trained 50 %",
        "refused client 1: loss is NaN at step 3",
    ):
        assert words in said, words
    if not terminal:
        assert "\x1b" not in said
        assert said.count("\n") == 9  # start, stage, four quarters of the warm-up, two rounds, one refusal; no bars


def test_quiet_is_silent(simulator: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def run(config: Config, *, observer: Any, force: bool) -> dict[str, Any]:
        seen.append(observer)
        raise KeyboardInterrupt

    simulator.run = run
    for words in (["--quiet"], []):
        invoke("simulate", f"out={tmp_path}/run", *words)
    quiet, usual = seen
    assert isinstance(quiet, NullObserver)
    assert usual is None  # the simulator then shows what it does
    for name, args in records():
        getattr(quiet, name)(*args)
    quiet.close()
    assert capsys.readouterr() == ("", "")
