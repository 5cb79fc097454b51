"""Buffered runs: the bits of rounds where none is stale, of one run on ranks and after a resume, and what is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from clocked import SLOW, clocked, lines, run
from tiny_runs import HOUSE, fedmoe, write_notes

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.comparison.run_figures import figures_of
from fedmoe_core.comparison.study import Study
from fedmoe_core.comparison.table import markdown, rows_of
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import PLACES
from fedmoe_core.reporting.report import report
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.progress import headline

FAST = "speed=5e7,downlink=500kbit,uplink=500kbit"
STALE = ("time.mode=buffered", "time.buffer=2", "rounds=6")  # four clients in flight, two of them slow
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("corpus") / "notes.jsonl")


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Make:
    def make(*words: str, out: str = "run", budgets: str = f"experts=8,{SLOW};experts=12,{FAST}") -> Config:
        return clocked(corpus, tmp_path / out, "rounds=3", f"budgets={budgets}", *words)

    return make


@pytest.mark.parametrize(
    "words",
    [
        *("hfedmoe", "hfedmoe_plus", "random", "most_activated", "reap_experts", "fedavg", "fedavg_smallest"),
        *("hfedmoe cohort.clients=2", "hfedmoe train.experts=lora", "hfedmoe_plus train.trunk=fedavg"),
    ],
)
def test_a_buffer_of_all_clients_is_a_round(config: Make, words: str) -> None:
    asked = f"algorithm={words}".split()
    rounds, buffered = (
        config(*asked, out="rounds"),
        config(*asked, "time.mode=buffered", "time.buffer=4", out="buffered"),
    )
    told, same = run(rounds), run(buffered)
    assert same["model_hash"] == told["model_hash"]
    assert same["virtual_seconds"] == pytest.approx(told["virtual_seconds"], rel=0.02)  # as predicted, not as spent
    assert (same["staleness_mean"], same["staleness_max"]) == (0.0, 0)
    for ours, theirs in zip(lines(buffered, kind="client"), lines(rounds, kind="client"), strict=True):
        assert ours == theirs
    assert "staleness_max" not in told
    assert "flight" not in lines(rounds, "ledger.jsonl")[0]


def test_a_slow_client_is_stale_and_every_time_follows_from_the_ledger(config: Make) -> None:
    asked = config(*STALE, "time.straggle=0.3")
    summary = run(asked)
    ledger, rounds = lines(asked, "ledger.jsonl"), lines(asked, kind="round")[1:]
    now = 0.0
    for line in rounds:
        answers = [entry for entry in ledger if entry["round"] == line["round"]]
        assert len(answers) == 2
        for entry in answers:
            flight, clock = entry["flight"], entry["clock"]
            assert flight["staleness"] == entry["round"] - 1 - flight["version"]
            took = clock["straggle"] * entry["predicted"]["virtual_seconds"]
            assert flight["arrived"] == pytest.approx(flight["dispatched"] + took)
            assert now <= flight["arrived"]
            assert clock["seconds"] == clock["straggle"] * entry["real"]["virtual_seconds"]
        assert line["virtual_seconds"] == pytest.approx(max(e["flight"]["arrived"] for e in answers) - now)
        now += line["virtual_seconds"]
        stale = [entry["flight"]["staleness"] for entry in answers]
        assert (line["staleness_mean"], line["staleness_max"]) == (sum(stale) / 2, max(stale))
        assert line["in_flight"] == 2
    oldest = max(ledger, key=lambda entry: entry["flight"]["staleness"])
    assert oldest["client"] in (0, 2)
    assert oldest["flight"]["staleness"] == summary["staleness_max"] > 0
    assert summary["virtual_seconds"] == rounds[-1]["virtual_seconds_total"] == pytest.approx(now)
    assert summary["budget_violations"] == summary["refused_updates"] == 0


def test_staleness_scales_what_is_applied(config: Make) -> None:
    hashes = {run(config(*STALE, f"time.staleness={a}", out=f"a{a}"))["model_hash"] for a in ("0", "0.5", "2")}
    assert len(hashes) == 3


@pytest.mark.parametrize("words", [("algorithm=hfedmoe_plus",), ("cohort.clients=2",)])
def test_inv10_ranks_and_a_resume_have_the_bits_and_the_times_of_one_run(
    config: Make, tmp_path: Path, words: tuple[str, ...]
) -> None:
    # hfedmoe_plus remembers gates and pools what all clients measured: an older state must come back whole.
    words = (*STALE, "time.straggle=0.5", *words)
    whole = run(config(*words, out="whole"))
    toml = tmp_path / "two.toml"
    toml.write_text(config(*words, "ranks=2", out="two").to_toml())
    assert fedmoe("simulate", toml, "-q").returncode in (0, 1)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: object) -> None:
            if round == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config(*words, out="cut"), observer=Stop())
    resumed = simulate.resume(tmp_path / "cut", observer=NullObserver())
    assert whole["staleness_max"] > 0
    for key in ("model_hash", "virtual_seconds", "staleness_mean", "staleness_max", "flops", "bytes_down"):
        assert whole[key] == two[key] == resumed[key], key
    if "cohort.clients=2" in words:
        assert whole["clients_in_cohorts"] == two["clients_in_cohorts"] == resumed["clients_in_cohorts"] > 0


def test_it_is_shown_at_the_start_in_the_report_and_in_a_comparison(config: Make) -> None:
    asked = config(*STALE)
    told: list[Mapping[str, Any]] = []

    class Start(NullObserver):
        def on_start(self, info: Mapping[str, Any]) -> None:
            told.append(info)

    summary = simulate.run(asked, observer=Start())
    assert headline(told[0]).endswith("6 rounds, buffered: 4 clients in flight, a step after 2 answers")
    path, said = report([Path(asked.out)])
    figure = f"{summary['staleness_mean']:.2f} on average, {summary['staleness_max']} at most"
    assert f"staleness of updates {figure}" in said[0]
    assert figure in path.read_text()
    figures = figures_of(read_runs([Path(asked.out)])[0], "hfedmoe")
    assert figures.spent.virtual_seconds == summary["virtual_seconds"]
    assert any("virtual time" in line for line in markdown(rows_of({"hfedmoe": [figures]}, target=100.0)))


def test_the_systems_that_can_are_those_that_the_refusal_names(config: Make) -> None:
    with pytest.raises(ValueError, match=r"time\.mode=buffered is not for") as no:
        run(config(*STALE, "algorithm=fedmoe"))
    named = str(no.value).partition("choose ")[2].partition(", or set")[0].replace(" or ", ", ").split(", ")
    assert set(named) == {name for name in PLACES if algorithm_class(name).asynchronous}


def test_every_variant_of_the_published_comparison_parses_and_trains_on_as_many_answers() -> None:
    variants = HOUSE / "bench" / "study" / "ablations" / "time.toml"
    words = (str(HOUSE / "examples" / "demo.toml"), "time.straggle=0.5")
    jobs = Study.of(words, systems="all", seeds="0", out=Path("x"), variants=variants).jobs()
    assert len({str(job.config.decisive()) for job in jobs}) == len(jobs) >= 4
    for config in (job.config for job in jobs):
        assert config.rounds * (config.time.buffer or config.clients) == 80


@pytest.mark.parametrize("system", ["fedmoe", "flex_moe", "flux", "fft_moe", "flame", "hetlora", "flexlora"])
def test_a_system_that_needs_a_whole_round_is_refused_before_anything_is_read(config: Make, system: str) -> None:
    with pytest.raises(
        ValueError, match=f"time.mode=buffered is not for algorithm='{system}'.*or set time.mode=rounds"
    ):
        run(config(*STALE, f"algorithm={system}"))
    assert not Path(config().out, "metrics.jsonl").exists()
