"""Attacks on runs, fewer than the commands of bench/trust make: no change of a file is silent, no kill loses a bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.trust.files import Field
from bench.trust.jobs import PLAIN
from bench.trust.kills import phases_of
from bench.trust.mutations import KINDS, WHOLE
from bench.trust.phases import PHASES
from fedmoe_core.simulation.observer import NullObserver

HOUSE = Path(__file__).parents[3]
CHANGES = 8 * len(KINDS)  # every kind eight times


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    return Field.of(PLAIN, tmp_path_factory.mktemp("runs"))


def test_inv10_inv11_changed_files_of_a_stopped_run_are_refused_or_harmless(field: Field) -> None:
    assert CHANGES >= 200
    found = [field.judge(number) for number in range(CHANGES)]
    assert [judged for judged in found if not judged.good] == []
    outcomes = Counter(judged.outcome for judged in found)
    assert outcomes["refused"] > CHANGES // 2
    assert outcomes["harmless"] > 5
    forged = [judged for judged in found if judged.what.startswith("forged")]
    assert len(forged) > CHANGES // 4
    assert {judged.what.split(" ")[1].rstrip(":") for judged in forged} >= {"meta", "marker", "partition", "tensor"}
    assert len({kind for kind in WHOLE if kind.startswith("forged")}) == 6


def test_the_judge_sees_what_is_silent_and_what_is_damaged(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a resume that takes everything, one that ends in a traceback, one that writes through a link."""
    import bench.trust.files as files

    whole = files.simulate.resume

    def taken(run: Path, observer: NullObserver) -> None:
        summary = whole(run, observer=observer)
        (run / "summary.json").write_text(json.dumps({**summary, "model_hash": "of another model"}))

    def doubled(run: Path, observer: NullObserver) -> None:
        whole(run, observer=observer)
        (run / "ledger.jsonl").write_bytes((run / "ledger.jsonl").read_bytes() * 2)

    def broken(run: Path, observer: object) -> None:
        raise KeyError("round")

    def elsewhere(run: Path, observer: object) -> None:
        (run.parent / "outside" / "precious").write_text("lost")
        raise ValueError("refused, and too late")

    def careless(run: Path, observer: object) -> None:
        (run / "config.toml").write_text("")
        raise ValueError("refused, and too late")

    number = next(number for number in range(CHANGES) if field.judge(number).outcome == "harmless")
    silent = ((taken, "silent"), (doubled, "silent"))
    for resume, outcome in (*silent, (broken, "traceback"), (elsewhere, "damage"), (careless, "damage")):
        monkeypatch.setattr(files.simulate, "resume", resume)
        assert field.judge(number).outcome == outcome


def test_inv10_runs_killed_at_moments_and_phases_end_with_the_same_bits(tmp_path: Path) -> None:
    """In a process of its own: the harness forks, and this one has threads."""
    paths = [str(HOUSE), str(HOUSE / "kernels"), str(HOUSE / "bindings")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.trust.kills", "--moments", "4", "--some", "--out", str(tmp_path / "record")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, cwd=HOUSE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "record").read_text())
    one, two = record["results"]
    assert record["bad"] == []
    assert one["killed at random moments"] == two["killed at random moments"] == 4
    assert one["same bits, lines and files"] == one["cases"] >= 4 + len({phase.name for phase in PHASES})
    assert two["same bits, lines and files"] == two["cases"] >= 10
    assert one["processes left"] == two["processes left"] == 0
    assert one["resumed"] > 20
    assert record["not met"] == []


def test_on_two_ranks_a_phase_of_every_rank_kills_either() -> None:
    victims = {(case.phase, case.victim) for case in phases_of(2, first=0)}
    assert {("before ranks' sums meet", 0), ("before ranks' sums meet", 1)} <= victims
    assert ("before the summary", 1) not in victims
