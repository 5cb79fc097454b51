"""The commands `first` and `second` without a GPU: against a fake clock they end in their box whatever a part does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("first", "second")


class Fake:
    """A clock, and a runner whose parts take as long and end as they are told; all others end well in half a box."""

    def __init__(self, folder: Path, **acts: tuple[float, int | None]) -> None:
        self.now, self.folder, self.acts = 100.0, folder, acts
        self.ran: list[tuple[str, float]] = []
        self.compiles = self.closed = False

    def clock(self) -> float:
        return self.now

    def run(self, part: Any, seconds: float, following: Any) -> int | None:
        self.ran.append((part.name, seconds))
        (self.folder / "gpu-h200-2026-01-01.tmp").write_text("half a draft")
        takes, code = self.acts.get(part.name, (0.5 * part.seconds, 0))
        if takes >= seconds:
            self.now += seconds
            return None
        self.now += takes
        return code

    def beside(self, part: Any) -> None:
        self.compiles = True

    def close(self) -> None:
        self.closed = True


def conduct(command: str, folder: Path, acts: Mapping[str, tuple[float, int | None]] | None = None, **how: Any) -> Any:
    """Run a command against a fake; the fake, and the conductor with what it says."""
    from bench.gpu.conduct import Conductor, plan_of
    from bench.gpu.plan import SECONDS

    fake = Fake(folder, **dict(acts or {}))
    said: list[str] = []
    conductor = Conductor(fake, fake.clock, folder, say=said.append, kept=how.get("kept"))
    conductor.conduct(plan_of(command, tiny=False), how.get("seconds", SECONDS[command]))
    return fake, conductor, said


def names(command: str) -> list[str]:
    from bench.gpu.conduct import plan_of

    return [part.name for part in plan_of(command, tiny=False)]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_boxes_of_a_command_fit_its_time(command: str) -> None:
    from bench.gpu.conduct import LAST
    from bench.gpu.plan import SECONDS, parts

    assert sum(part.seconds for part in parts(command)) + LAST <= SECONDS[command]
    assert names(command)[:2] == ["cache", "facts"]
    assert len(set(names(command))) == len(names(command))


def test_the_first_minutes_come_in_the_order_that_matters() -> None:
    assert names("first") == ["cache", "facts", "kernels", "correct-bfloat16", "memcheck", "time", "tune"]


def test_the_second_minutes_end_with_what_can_wait() -> None:
    from bench.common.cases import SWEEP_CASES
    from bench.gpu.plan import SWEEP

    assert names("second")[-2:] == ["sweep", "liger"]
    assert {"routing", "model"} <= set(names("second"))
    assert SWEEP.split(",") == [case.name for case in SWEEP_CASES], "the plan cannot import them"


@pytest.mark.parametrize("act", [(1e9, 0), (1.0, -11), (1.0, 1), (1.0, 75), (1.0, 2)], ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_a_part_does_the_others_run_in_the_time(
    command: str, act: tuple[float, int | None], tmp_path: Path
) -> None:
    """A hang, a crash, a red check, a lost context and a refusal, of every part in turn."""
    from bench.gpu.plan import SECONDS

    (tmp_path / "tiles.json").write_text("{}")
    done = tmp_path / "parts.json"
    for name in names(command):
        done.unlink(missing_ok=True)
        if command == "second":
            conduct("first", tmp_path)
        fake, _conductor, _ = conduct(command, tmp_path, {name: act})
        ran = {part for part, _ in fake.ran}
        expected = set(names(command)) - (set(names("first")) - {"cache", "facts"} if command == "second" else set())
        if name in expected:
            assert ran >= expected - {name}, f"{name} blocked {expected - ran}"
        assert fake.now - 100.0 <= SECONDS[command]
        assert fake.closed
        assert not list(tmp_path.glob("*.tmp")), "half a draft stays nowhere"


@pytest.mark.parametrize("command", COMMANDS)
def test_when_every_part_hangs_the_command_still_ends(command: str, tmp_path: Path) -> None:
    from bench.gpu.plan import SECONDS
    from bench.gpu.summary import summary

    fake, conductor, _ = conduct(command, tmp_path, dict.fromkeys(names(command), (1e9, 0)))
    assert fake.now - 100.0 <= SECONDS[command]
    lines, red = summary(command, tmp_path, conductor.ended)
    assert lines[-1].startswith(f"{command.upper()} RED ")
    assert len(lines) <= 40
    assert "kernels" in red


def test_a_shorter_time_leaves_the_last_parts_out_and_says_so(tmp_path: Path) -> None:
    fake, conductor, said = conduct("first", tmp_path, dict.fromkeys(names("first"), (1e9, 0)), seconds=120.0)
    assert fake.now - 100.0 <= 120.0
    assert conductor.ended["tune"].status == "no time"
    assert "-- tune: no time is left" in said


def test_time_that_a_part_leaves_goes_to_those_after_it(tmp_path: Path) -> None:
    quick, _, _ = conduct("first", tmp_path, dict.fromkeys(names("first")[:-1], (1.0, 0)))
    boxes = dict(quick.ran)
    assert boxes["tune"] > 200


def test_a_crash_begins_again_in_the_same_box_and_at_most_twice(tmp_path: Path) -> None:
    fake, conductor, _ = conduct("first", tmp_path, {"time": (2.0, -11)})
    tries = [seconds for name, seconds in fake.ran if name == "time"]
    assert len(tries) == 3
    assert tries == sorted(tries, reverse=True)
    assert conductor.ended["time"].status == "crashed"


def test_a_cache_of_another_triton_compiles_beside_what_is_timed(tmp_path: Path) -> None:
    assert not conduct("first", tmp_path)[0].compiles
    (tmp_path / "parts.json").unlink()
    fake, _conductor, _ = conduct("first", tmp_path, {"cache": (1.0, 3)})
    assert fake.compiles
    assert "kernels" in {name for name, _ in fake.ran}


def test_what_is_done_is_not_done_again_and_what_is_not_comes_first(tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_text("{}")
    conduct("first", tmp_path, {"memcheck": (1e9, 0), "tune": (1.0, 75)})
    fake, _conductor, _ = conduct("second", tmp_path)
    ran = [name for name, _ in fake.ran]
    assert ran[:4] == ["cache", "facts", "memcheck", "tune"]
    assert "time" not in ran
    assert ran[4:] == names("second")[names("second").index("correct") :]


def test_parts_with_tuned_tiles_wait_for_tiles(tmp_path: Path) -> None:
    fake, conductor, _ = conduct("second", tmp_path)
    assert "time-tuned" not in {name for name, _ in fake.ran}
    assert conductor.ended["time-tuned"].status == "left out"


def test_results_are_kept_where_the_next_command_looks(tmp_path: Path) -> None:
    from bench.gpu.conduct import take_earlier

    first, kept, second = (tmp_path / name for name in ("first", "kept", "second"))
    first.mkdir()
    second.mkdir()
    (first / "gpu-h200-2026-01-01.json").write_text("{}")
    conduct("first", first, kept=kept)
    take_earlier(second, (tmp_path / "nowhere", kept))
    assert {path.name for path in second.iterdir()} == {path.name for path in first.iterdir()}
    (second / "parts.json").write_text("mine")
    take_earlier(second, (kept,))
    assert (second / "parts.json").read_text() == "mine", "what is there is not replaced"


def test_the_summary_is_short_and_names_what_is_red(tmp_path: Path) -> None:
    from bench.gpu.summary import summary

    _, conductor, _ = conduct("first", tmp_path)
    row = {"shape": "s", "launch": "eager", "pass": "fwd+bwd", "peer": "fedmoe", "ms": 1.0, "TFLOP/s": 2.0}
    rows = [row | {"case": f"case {i}", "ratio_to_best_peer": 1.5} for i in range(60)]
    routed = {"router": "r", "peer": "fedmoe", "pass": "fwd", "us": 30.0, "host us": 70.0}
    model = {"model": "m", "batch": [4, 2048], "peer": "fedmoe", "tokens/s": 1e6, "ms": 8.192}
    data: dict[str, Any] = {"routing": [routed, routed | {"pass": "bwd"}], "models": [model], "checks": []}
    path = tmp_path / "gpu-h200-2026-01-01.json"
    path.write_text(json.dumps(data))
    lines, _ = summary("first", tmp_path, conductor.ended)
    assert "routing alone, r: fedmoe fwd 30 us (host 70), bwd 30 us (host 70)" in lines
    assert "tokens/s, m, 4 x 2048 tokens: fedmoe 1000000 (8.19 ms)" in lines
    data |= {"rows": rows, "checks": [{"name": "a, b", "status": "passed", "detail": ""}]}
    path.write_text(json.dumps(data))
    lines, red = summary("first", tmp_path, conductor.ended)
    assert (len(lines), lines[-1], red) == (40, "FIRST OK", [])
    data["checks"][0]["status"] = "failed"
    path.write_text(json.dumps(data))
    lines, red = summary("first", tmp_path, conductor.ended)
    assert (len(lines), lines[-1], red) == (40, "FIRST RED a b", ["a b"])
    path.write_text(path.read_text()[:50])  # a file that was cut: what is known from the parts is said all the same
    assert summary("first", tmp_path, conductor.ended)[0][-1] == "FIRST OK"


def test_a_part_and_all_it_started_is_ended(tmp_path: Path) -> None:
    """Real processes: a child in a process group of its own, as compute-sanitizer's target is, ends too."""
    from bench.gpu.plan import Part
    from bench.gpu.process import Processes

    mark = tmp_path / "alive"
    child = f"import pathlib, time\nwhile True: pathlib.Path({str(mark)!r}).write_text(str(time.time()))"
    (tmp_path / "part_that_hangs.py").write_text(
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}], process_group=0)\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )
    said: list[tuple[str, str]] = []
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    runner = Processes((), environment, lambda part, line: said.append((part, line)))
    part = Part("hangs", 6.0, (), module="part_that_hangs")
    began = time.monotonic()
    assert runner.run(part, 6.0, None) is None
    runner.close()
    assert time.monotonic() - began < 50, "it would have ended by itself after 60"
    assert ("hangs", "begun") in said
    time.sleep(0.3)
    last = mark.read_text()
    time.sleep(0.3)
    assert mark.read_text() == last, "a child lives on"


def test_a_part_that_takes_its_process_down_is_seen(tmp_path: Path) -> None:
    from bench.gpu.plan import Part
    from bench.gpu.process import Processes

    (tmp_path / "part_that_falls.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    runner = Processes((), {**os.environ, "PYTHONPATH": str(tmp_path)}, lambda part, line: None)
    assert runner.run(Part("falls", 20.0, (), module="part_that_falls"), 20.0, None) == -11


@pytest.mark.timeout(900)
def test_both_commands_for_real_on_a_cpu(tmp_path: Path) -> None:
    """The shell script, real processes, tiny shapes: both end in their time with few files and a verdict."""
    environment = {name: value for name, value in os.environ.items() if name not in ("FEDMOE_TILES",)}
    environment |= {"PYTHON": sys.executable, "RESULTS": str(tmp_path), "OPTIONS": "--device cpu --tiny --rounds 2"}
    for command, seconds in (("first", 150), ("second", 150)):
        began = time.monotonic()
        words = ["bash", str(ROOT / "bench" / "gpu.sh"), command, "--seconds", str(seconds)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert time.monotonic() - began < seconds + 30
        last = done.stdout.splitlines()[-1]
        assert last.startswith(f"{command.upper()} "), f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
        parts = json.loads((tmp_path / "parts.json").read_text())
        states = {name: part["status"] for name, part in parts.items()}
        assert set(states.values()) <= {"done", "cut", "left out", "not ready", "no time"}, done.stdout[-6000:]
        assert states["facts"] == states["kernels"] == states["memcheck"] == "done", states
    (found,) = tmp_path.glob("rehearsal-cpu-*.json")
    data = json.loads(found.read_text())
    assert data["ceilings"]
    assert {row["peer"] for row in data["rows"]} >= {"fedmoe", "grouped_mm", "dense"}
    if states["routing"] == states["model"] == "done":
        assert {row["peer"] for row in data["routing"]} == {"fedmoe", "torch"}
        assert {row["peer"] for row in data["models"]} == {"fedmoe", "transformers"}
    assert len(list(tmp_path.iterdir())) <= 8
    assert "T+" in (tmp_path / "log.txt").read_text()
