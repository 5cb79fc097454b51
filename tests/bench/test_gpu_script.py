"""The GPU script rehearsed on a CPU: what it writes, what it refuses, how it goes on, and who it leaves out and why."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HOUSE = Path(__file__).parents[2]
CASES = "all,small-eighth-quarter"
PEERS = {
    "broken": "return dataclasses.replace(good, name='broken', bind=raises)",
    "wrong": "return dataclasses.replace(good, name='wrong', bind=off_by_a_tenth)",
    "absent": "import a_package_that_is_not_there",
}
TEMPLATE = """
import dataclasses
from bench.common.peers import grouped_mm

def contender():
    good = grouped_mm()
    def raises(task):
        raise RuntimeError('the kernel did not launch')
    def off_by_a_tenth(task):
        bound = good.bind(task)
        return bound._replace(forward=lambda *a: 1.1 * bound.forward(*a))
    {body}
"""


def call(*words: str) -> tuple[int, str]:
    """The script's exit code and what it said on both streams."""
    from bench.gpu import run as gpu

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = gpu.main(list(words))
    return code, said.getvalue()


class Rehearsal(NamedTuple):
    folder: Path
    words: tuple[str, ...]
    code: int
    said: str

    @property
    def path(self) -> Path:
        (found,) = self.folder.glob("*.json")
        return found

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """One whole run with three peers that cannot be timed."""
    folder = tmp_path_factory.mktemp("results")
    peers = tmp_path_factory.mktemp("peers")
    words = ["--device", "cpu", "--tiny", "--rounds", "2", "--shapes", "tiny", "--cases", CASES]
    for name, body in PEERS.items():
        (peers / f"{name}.py").write_text(TEMPLATE.format(body=body))
        words += ["--peer", str(peers / f"{name}.py")]
    words += ["--results", str(folder)]
    return Rehearsal(folder, tuple(words), *call(*words))


def test_a_rehearsal_ends_well_and_says_loudly_what_it_is(rehearsal: Rehearsal) -> None:
    assert rehearsal.code == 0, rehearsal.said
    assert rehearsal.said.count("NOT GPU NUMBERS") >= 8  # before and after each part
    assert rehearsal.path.name.startswith("rehearsal-cpu-")
    assert "NOT GPU NUMBERS" in rehearsal.data["warning"]
    assert "NOT GPU NUMBERS" in rehearsal.path.with_suffix(".md").read_text()


def test_rows_carry_all_that_a_number_needs(rehearsal: Rehearsal) -> None:
    data = rehearsal.data
    keys = {
        "gpu",
        "driver",
        "torch",
        "triton",
        "commit",
        "kernels",
        "harness",
        "tiles",
        "red",
        "shape",
        "case",
        "sizes",
        "dtype",
        "peer",
        "detail",
    }
    keys |= {"launch", "pass", "ms", "ms quartiles", "rounds", "TFLOP/s", "MB", "MB kept", "MB held", "MB predicted"}
    keys |= {"detail", "errors", "roofline ms", "percent_of_roofline", "best_peer", "ratio_to_best_peer", "stores_all"}
    assert all(keys <= row.keys() for row in data["rows"])
    timed = {(row["case"], row["peer"], row["pass"]) for row in data["rows"]}
    assert len(timed) == len(data["rows"])
    everyone = {"fedmoe", "fedmoe-recompute", "grouped_mm", "transformers-grouped_mm", "transformers-eager", "dense"}
    passes = ("fwd", "bwd", "fwd+bwd")
    assert {("all", peer, name) for peer in everyone for name in passes} <= timed
    assert ("small-eighth-quarter", "grouped_mm-compact", "fwd") in timed
    assert all(row["ms"] > 0 and row["rounds"] == 2 for row in data["rows"])
    assert all(set(row["errors"]) == {"y", "dx", "ds", "dw_in", "dw_out"} for row in data["rows"] if row["errors"])
    best = min((r for r in data["rows"] if r["stores_all"] and r["peer"] != "dense" and r["pass"] == "bwd"), key=_ms)
    same = [r for r in data["rows"] if r["pass"] == "bwd" and r["case"] == best["case"]]
    assert {r["best_peer"] for r in same} == {best["peer"]}
    assert all(r["ratio_to_best_peer"] == pytest.approx(best["ms"] / r["ms"]) for r in same)


def _ms(row: dict[str, Any]) -> float:
    return row["ms"]


def test_checks_are_kept_by_name_and_skips_give_their_reason(rehearsal: Rehearsal) -> None:
    checks = {check["name"]: check for check in rehearsal.data["checks"]}
    assert len(checks) == len(rehearsal.data["checks"]) > 100
    assert {check["status"] for check in checks.values()} == {"passed", "skipped"}
    assert checks["the float64 truth is the reference"]["status"] == "passed"
    assert checks["bfloat16: a CUDA graph of route, forward and backward"]["detail"] == "CUDA graphs need a GPU"
    assert "CPU" in checks["compute-sanitizer memcheck"]["detail"]


@pytest.mark.parametrize(
    ("peer", "status", "said"),
    [
        ("broken", "failed", "RuntimeError: the kernel did not launch"),
        ("wrong", "wrong", "y 1.0e-01"),
        ("absent", "not importable", "a_package_that_is_not_there"),
    ],
)
def test_a_peer_that_fails_is_reported_and_never_timed(rehearsal: Rehearsal, peer: str, status: str, said: str) -> None:
    records = [record for record in rehearsal.data["left_out"] if record["peer"] == peer]
    assert records
    assert all(record["status"] == status and said in record["reason"] for record in records)
    assert not [row for row in rehearsal.data["rows"] if row["peer"] == peer]
    assert peer in rehearsal.path.with_suffix(".md").read_text()


def test_tables_and_plots_are_written(rehearsal: Rehearsal) -> None:
    plots = sorted(path.name.rsplit("-", 1)[-1] for path in rehearsal.folder.glob("*.png"))
    assert plots == ["forward.png", "rate.png", "ratio.png"]  # no memory and no roofline on a CPU
    assert all(path.stat().st_size > 10_000 for path in rehearsal.folder.glob("*.png"))
    table = rehearsal.path.with_suffix(".md").read_text()
    assert "| all | fwd+bwd | eager | fedmoe |" in table
    assert table.count("not measured: ") == 8  # a rehearsal meets no goal


def test_plots_are_made_at_home_from_the_file(rehearsal: Rehearsal, tmp_path: Path) -> None:
    """No GPU and no agreement with this machine is needed: the numbers are another's."""
    path = tmp_path / "gpu-h200-2026-01-01.json"
    data = rehearsal.data | {"about": rehearsal.data["about"] | {"gpu": "NVIDIA H200", "rehearsal": False}}
    path.write_text(json.dumps(data))
    code, said = call("plot", "--out", str(path))
    assert code == 0, said
    assert "# NVIDIA H200" in path.with_suffix(".md").read_text()
    assert list(tmp_path.glob("*.png"))
    assert json.loads(path.read_text()) == data, "the file itself stays as it is"


def test_a_finished_run_is_not_measured_again(rehearsal: Rehearsal) -> None:
    before = rehearsal.data
    code, said = call("time", *rehearsal.words)
    assert code == 0, said
    assert rehearsal.data == before
    # What was cut off in a case begins that case again, and no other.
    unfinished = rehearsal.data
    unfinished["finished"] = [record for record in before["finished"] if record["case"] != "all"]
    rehearsal.path.write_text(json.dumps(unfinished))
    assert call("time", *rehearsal.words)[0] == 0
    after = rehearsal.data
    assert len(after["rows"]) == len(before["rows"])
    kept = [row for row in before["rows"] if row["case"] != "all"]
    assert [row for row in after["rows"] if row["case"] != "all"] == kept
    assert [row for row in after["rows"] if row["case"] == "all"] != [r for r in before["rows"] if r["case"] == "all"]


def test_a_peer_that_took_the_process_down_is_not_tried_again(rehearsal: Rehearsal, tmp_path: Path) -> None:
    data = rehearsal.data
    data["left_out"] = [record for record in data["left_out"] if record["peer"] != "broken"]
    data["finished"] = []
    data["attempts"] = [r | {"peer": "broken", "launch": "eager"} for r in rehearsal.data["finished"]]
    (tmp_path / rehearsal.path.name).write_text(json.dumps(data))
    words = [str(tmp_path) if word == str(rehearsal.folder) else word for word in rehearsal.words]
    assert call("time", *words, "--cases", "all")[0] == 0
    after = json.loads((tmp_path / rehearsal.path.name).read_text())
    (record,) = [record for record in after["left_out"] if record["peer"] == "broken"]
    assert record["status"] == "died"


def test_results_of_other_kernels_are_set_aside(rehearsal: Rehearsal) -> None:
    from bench.gpu.measure.store import Store

    about = rehearsal.data["about"]
    assert Store(about, rehearsal.folder).data["rows"] == rehearsal.data["rows"]
    other = about | {"kernels": "0123456789ab"}
    folder, kept = rehearsal.folder.with_name("aside"), rehearsal.path.read_text()
    folder.mkdir()
    (folder / rehearsal.path.name).write_text(kept)
    assert Store(other, folder).data["rows"] == []
    assert (folder / f"{rehearsal.path.stem}.{about['kernels']}.json").read_text() == kept


@pytest.mark.parametrize("changed", [{"harness": "other"}, {"driver": "580.159.04"}, {"transformers": "9"}])
def test_another_harness_or_driver_voids_nothing(rehearsal: Rehearsal, changed: dict[str, str]) -> None:
    """A mended script must not cost the checks that have passed; what differs stands in each new record."""
    from bench.gpu.measure.store import Store

    store = Store(rehearsal.data["about"] | changed, rehearsal.folder)
    assert store.data["rows"] == rehearsal.data["rows"]
    assert store.find("checks", status="passed")


def test_rows_of_tuned_tiles_stand_beside_those_of_static_ones(rehearsal: Rehearsal, tmp_path: Path) -> None:
    from bench.gpu.measure.store import Store

    (tmp_path / rehearsal.path.name).write_text(rehearsal.path.read_text())
    store = Store(rehearsal.data["about"] | {"tiles": "tuned"}, tmp_path)
    assert store.data["rows"]
    assert not store.find("rows"), "none of them is of these tiles"
    assert not store.find("checks")
    store.replace("rows", {"case": "all"}, [{"case": "all", "ms": 1.0}])
    assert [row["ms"] for row in store.find("rows")] == [1.0]
    assert len(store.data["rows"]) == len(rehearsal.data["rows"]) + 1


def test_the_commit_is_known_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.common import machine as gpu_machine

    monkeypatch.setattr(gpu_machine, "_git", lambda *words: "")
    monkeypatch.setattr(gpu_machine, "COMMIT_FILE", tmp_path / "commit")
    monkeypatch.delenv("FEDMOE_COMMIT", raising=False)
    assert gpu_machine.commit() == "unknown"
    (tmp_path / "commit").write_text("abc1234\n")
    assert gpu_machine.commit() == "abc1234"
    monkeypatch.setenv("FEDMOE_COMMIT", "def5678")
    assert gpu_machine.commit() == "def5678"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu"], "--device cpu takes the tiny shapes only"),
        (["--device", "cpu", "--tiny", "--out", "gpu-h100-2026-01-01.json"], "a name for a GPU's results"),
        (["--device", "cpu", "--tiny", "--shapes", "huge"], "--shapes has no huge"),
    ],
)
def test_what_cannot_be_a_rehearsal_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    code, answer = call("correct", *words, "--results", str(tmp_path))
    assert code == 2
    assert said in answer
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_nothing_is_measured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, answer = call("correct")
    assert code == 2
    assert "there is no CUDA device here" in answer


def test_a_red_check_marks_the_rows_and_hides_none(rehearsal: Rehearsal, tmp_path: Path) -> None:
    data = rehearsal.data
    data["checks"][3]["status"] = "failed"
    red = data["checks"][3]["name"]
    data["finished"], data["rows"] = [], []
    (tmp_path / rehearsal.path.name).write_text(json.dumps(data))
    words = [str(tmp_path) if word == str(rehearsal.folder) else word for word in rehearsal.words]
    code, answer = call("time", *words)
    assert code == 0, answer
    rows = json.loads((tmp_path / rehearsal.path.name).read_text())["rows"]
    assert rows
    assert all(row["red"] == [red] for row in rows)
    assert call("plot", *words)[0] == 0
    assert "Timed although 1 checks are red" in (tmp_path / rehearsal.path.name).with_suffix(".md").read_text()


def test_other_contenders_are_measured_beside_those_that_were(rehearsal: Rehearsal, tmp_path: Path) -> None:
    (tmp_path / rehearsal.path.name).write_text(rehearsal.path.read_text())
    words = [str(tmp_path) if word == str(rehearsal.folder) else word for word in rehearsal.words]
    before = rehearsal.data["rows"]
    assert call("time", *words, "--contenders", "fedmoe,grouped_mm")[0] == 0
    path = tmp_path / rehearsal.path.name
    assert json.loads(path.read_text())["rows"] == before, "both were measured"
    data = rehearsal.data
    for record in data["finished"]:
        record["contenders"] = ["fedmoe"]
    path.write_text(json.dumps(data))
    assert call("time", *words, "--contenders", "fedmoe,grouped_mm")[0] == 0
    assert {row["peer"] for row in json.loads(path.read_text())["rows"]} == {"fedmoe", "grouped_mm"}


def test_checks_that_matter_come_first() -> None:
    from bench.gpu.measure import behave, correct

    found = correct.checks("cpu", "cpu", tiny=True) | behave.checks("cpu", "cpu", tiny=True)
    names = list(correct.in_order(found))
    assert set(names) == set(found)
    first = [name for name in names if correct.matters_first(name)]
    assert names[: len(first)] == first
    assert all(name.startswith(("bfloat16", "route", "the float64")) for name in first)
    assert "bfloat16: a CUDA graph of route, forward and backward" in names[:8]
    assert names[-1].startswith(("float32", "torch.compile"))


def test_what_a_tool_watches_ends_with_it(tmp_path: Path) -> None:
    """A tool that is late is ended with its target; without that the target stays on the GPU."""
    import time

    from bench.gpu.measure import sanitize

    mark = tmp_path / "alive"
    target = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).write_text(str(time.time())); time.sleep(0.05)"
    )
    tool = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {target!r}])"
    assert sanitize.run([sys.executable, "-c", tool], 6.0) == (None, "")
    time.sleep(0.3)
    last = mark.read_text()
    time.sleep(0.3)
    assert mark.read_text() == last, "the target lives on"
    assert sanitize.run([sys.executable, "-c", "print('said'); raise SystemExit(3)"], 10.0) == (3, "said\n")


@pytest.mark.parametrize("module", ["bench.tune.run", "bench.gpu.dry", "bench.gpu.run"])
def test_commands_run_with_nothing_installed(module: str) -> None:
    """From the checkout's folder, without PYTHONPATH and without the editable install's own finder."""
    pytest.importorskip("triton")
    code = "import sys; sys.argv = ['x', '--help']\n"
    code += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__ + repr(f).lower()]\n"
    code += "import atexit; atexit.register(lambda: print(__import__('fedmoe_kernels').__file__))\n"
    code += f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
    assert done.stdout.splitlines()[-1] == str(HOUSE / "kernels" / "fedmoe_kernels" / "__init__.py")


def test_a_worker_that_ends_fails_its_check_and_no_other() -> None:
    import time

    from bench.gpu import workers

    names = ["float32: no token", "there is no such check", "float32: one token"]
    options = ["--device", "cpu", "--tiny"]
    found = {r["name"]: r for r in workers.run(names, 1, options, time.monotonic() + 60)}
    assert [found[name]["status"] for name in names] == ["passed", "failed", "passed"]
    assert "its process ended with code 1" in found["there is no such check"]["detail"]
    assert list(workers.run(names, 1, options, time.monotonic() - 1)) == []
    # Time for one check to begin, and not for three: a result is of that one, if it came soon enough.
    late = [r["name"] for r in workers.run(names, 1, options, time.monotonic() + 0.2)]
    assert late in ([], names[:1])
