"""The runs of a comparison: what is done stays done, what failed is named, and nothing outlives an interruption."""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import HOUSE, TINY, write_notes

from fedmoe_core.comparison.jobs import (
    JobOutcome,
    Variant,
    make_jobs,
    other_runs,
    parse_seeds,
    parse_variants,
    remaining,
    run_jobs,
)
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import ALGORITHMS, SECTIONS, concerns

CORE = HOUSE / "fedmoe_core"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths = ":".join(str(HOUSE / part) for part in (".", "kernels", "bindings"))
    monkeypatch.setenv("PYTHONPATH", paths)
    return [*TINY, f"data=jsonl:{write_notes(tmp_path / 'notes.jsonl')}", f"cache={tmp_path / 'cache'}"]


def play(jobs: list, words: list[str], workers: int = 2) -> tuple[list[JobOutcome], list[tuple[JobOutcome, float]]]:
    seen: list[tuple[JobOutcome, float]] = []
    return run_jobs(jobs, words, workers=workers, watch=lambda *told: seen.append(told)), seen


def test_seeds() -> None:
    assert parse_seeds("0-3") == (0, 1, 2, 3)
    assert parse_seeds("5, 1,7-8") == (5, 1, 7, 8)
    for bad in ("", "a", "1-", "1,1", "3-1"):
        with pytest.raises(ValueError, match="write 0-7"):
            parse_seeds(bad)


def test_variants_are_algorithms_or_named_words() -> None:
    both = parse_variants(["fedavg", "HFedMoE, score s"], {"HFedMoE, score s": ["selection.score=s"]})
    assert [v.words for v in both] == [("algorithm=fedavg",), ("selection.score=s",)]
    assert both[1].slug == "HFedMoE--score-s"


def test_contenders_need_names_of_their_own(tmp_path: Path) -> None:
    twins = [Variant("a b", ()), Variant("a-b", ())]
    with pytest.raises(ValueError, match="two systems are called 'a-b'"):
        make_jobs([], twins, [0], out=tmp_path, threads=1)
    with pytest.raises(ValueError, match="at least one system"):
        make_jobs([], [], [0], out=tmp_path, threads=1)


def test_an_unknown_system_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fedavgg"):
        make_jobs([], parse_variants(["fedavgg"], {}), [0], out=tmp_path, threads=1)


def test_a_comparison_runs_once_survives_a_bad_run_and_goes_on(tmp_path: Path, words: list[str]) -> None:
    good, bad = Variant("FedAvg", ("algorithm=fedavg",)), Variant("too small", ("budgets=memory=1KiB",))
    jobs = make_jobs(words, [good, bad], [0, 1], out=tmp_path / "study", threads=1)[:3]  # a second bad one adds nothing

    outcomes, seen = play(jobs, words)
    assert [o.job.name for o in outcomes] == ["FedAvg, seed 0", "FedAvg, seed 1", "too small, seed 0"]
    assert [bool(o.error) for o in outcomes] == [False, False, True]
    assert "1.00 KiB" in outcomes[2].error or "memory" in outcomes[2].error
    assert [job.name for job in remaining(jobs)] == ["too small, seed 0"]
    assert len(seen) == 3
    assert seen[-1][1] == 0.0  # nothing is left to wait for

    finished = (jobs[0].out / "summary.json").stat().st_mtime_ns
    again, seen = play(jobs[:2], words)
    assert all(o.cached for o in again)
    assert all(math.isnan(left) for _, left in seen)
    assert (jobs[0].out / "summary.json").stat().st_mtime_ns == finished

    ledger, summary = jobs[0].out / "ledger.jsonl", jobs[1].out / "summary.json"
    was = ledger.read_text(), summary.read_text()
    ledger.write_text(was[0].replace('"bytes_up": ', '"bytes_up": 1', 1))
    summary.write_text(was[1][:100])
    assert [said.rpartition("holds a run ")[2] for said in other_runs(jobs[:2]).values()] == [
        "whose ledger.jsonl changed after it ended",
        "whose summary.json changed after it ended",
    ]
    ledger.write_text(was[0])
    summary.write_text(was[1])
    assert other_runs(jobs[:2]) == {}

    summary.unlink()  # as if it had been killed after its last round
    assert jobs[1].command(words)[3:5] == ["resume", str(jobs[1].out)]
    third, _ = play(jobs[:2], words)
    assert [(o.cached, o.error) for o in third] == [(True, ""), (False, "")]

    changed = make_jobs([*words, "train.lr=1e-3"], [good], [0], out=tmp_path / "study", threads=1)
    assert not changed[0].finished()
    assert not changed[0].begun()
    elsewhere = make_jobs([*words, "flux.probes=7"], [good], [0], out=tmp_path / "study", threads=1)
    assert elsewhere[0].finished()  # FedAvg reads nothing of [flux]


def test_sections_concern_the_system_that_reads_them_and_all_else_everybody() -> None:
    sections = {section for key in Config().decisive() for section, dot, _ in [key.partition(".")] if dot}
    assert set(SECTIONS) <= sections
    assert set(SECTIONS.values()) <= set(ALGORITHMS)
    assert concerns("flux.probes", ["flux"])
    assert not concerns("flux.probes", ["fedavg", "fedmoe"])
    assert concerns("train.lr", ["fedavg"])
    assert concerns("rounds", ["fedavg"])
    for section, system in SECTIONS.items():  # nobody else's code names the section
        readers = [path.stem for path in CORE.rglob("*.py") if re.search(rf"config\.{section}\b", path.read_text())]
        assert readers == [system]


def test_a_killed_worker_is_named(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(words, [Variant("FedAvg", ("algorithm=fedavg",))], [0], out=tmp_path / "study", threads=1)
    suicide = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    monkeypatch.setattr(type(jobs[0]), "command", lambda self, words, afresh: suicide)
    outcomes, _ = play(jobs, words)
    assert outcomes[0].error == "killed by SIGKILL"


def test_an_interruption_stops_the_children(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(words, [Variant("slow", ()), Variant("quick", ())], [0], out=tmp_path / "study", threads=1)
    mark = tmp_path / "alive"
    sleeper = [sys.executable, "-c", f"import time; time.sleep(3); open({str(mark)!r}, 'w')"]
    monkeypatch.setattr(
        type(jobs[0]), "command", lambda self, words, afresh: sleeper if self.variant.label == "slow" else ["true"]
    )

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, words, workers=2, watch=stop)
    time.sleep(3.5)
    assert not mark.exists()
