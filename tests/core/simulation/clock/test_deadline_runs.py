"""Runs under a virtual clock: how long a round takes, what a deadline shortens, drops, names and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from clocked import SLOW, clocked, lines, run
from tiny_runs import fedmoe, write_notes

from fedmoe_core.comparison.run_figures import figures_of
from fedmoe_core.comparison.table import markdown, rows_of
from fedmoe_core.config.run_config import Config
from fedmoe_core.reporting.report import report
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver

FAST = "speed=1e8,downlink=1Mbit,uplink=1Mbit"
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_notes(tmp_path_factory.mktemp("corpus") / "notes.jsonl")


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Make:
    def make(*words: str, out: str = "run", budgets: str = f"{SLOW};{FAST}") -> Config:
        return clocked(corpus, tmp_path / out, "rounds=2", "train.local_steps=4", f"budgets={budgets}", *words)

    return make


def times(config: Config) -> dict[int, float]:
    """Predicted seconds of each client's first round, by client."""
    return {place: sum(row.seconds or ()) for place, row in enumerate(simulate.dry_run(config))}


def test_a_round_takes_as_long_as_its_slowest_client_and_the_ledger_says_why(config: Make) -> None:
    asked = config()
    summary, took = run(asked), times(asked)
    rounds, ledger = lines(asked, kind="round"), lines(asked, "ledger.jsonl")
    assert rounds[0]["virtual_seconds_total"] == 0.0
    first = [entry for entry in ledger if entry["round"] == 1]
    for entry in first:
        assert entry["predicted"]["virtual_seconds"] == pytest.approx(took[entry["client"]])
        assert entry["real"]["virtual_seconds"] == entry["clock"]["seconds"]
        assert entry["clock"]["straggle"] == 1.0
    assert rounds[1]["virtual_seconds"] == max(entry["clock"]["seconds"] for entry in first)
    assert rounds[2]["virtual_seconds"] < rounds[1]["virtual_seconds"], "the trunk travels once"
    assert summary["virtual_seconds"] == rounds[1]["virtual_seconds"] + rounds[2]["virtual_seconds"]


def test_without_a_speed_in_every_tier_there_is_no_clock(config: Make) -> None:
    asked = config(budgets=f"{FAST};experts=50%")
    assert "virtual_seconds" not in run(asked)
    assert "clock" not in lines(asked, "ledger.jsonl")[0]
    assert "virtual_seconds_total" not in lines(asked, kind="round")[0]
    with pytest.raises(ValueError, match=r"time.deadline needs the speed of every device, and budget 'experts=50%'"):
        config("time.deadline=3", budgets=f"{FAST};experts=50%")


def test_the_clock_alone_changes_no_bit(config: Make) -> None:
    plain = run(config(out="plain", budgets="experts=8;experts=16"))["model_hash"]
    clocked = config("time.straggle=0.5", out="clocked", budgets=f"experts=8,{SLOW};experts=16,{FAST}")
    assert run(clocked)["model_hash"] == plain


def test_a_deadline_shortens_plans_to_the_steps_that_fit(config: Make) -> None:
    free = simulate.dry_run(config())
    slow = free[0].seconds
    assert slow is not None
    step = slow.compute / free[0].local_steps
    asked = config(f"time.deadline={sum(slow) - 1.5 * step!r}")
    rows = simulate.dry_run(asked)
    assert [row.local_steps for row in rows] == [2, 4, 2, 4]
    assert [row.experts for row in rows] == [row.experts for row in free]
    summary = run(asked)
    assert (summary["late_updates"], summary["budget_violations"]) == (0, 0)
    assert [line["steps"] for line in lines(asked, kind="client") if line["round"] == 1] == [2, 4, 2, 4]


def test_who_cannot_finish_one_step_is_never_drawn_and_named(config: Make) -> None:
    took = times(config())
    asked = config(f"time.deadline={1.05 * took[1]!r}", "clients_per_round=3")
    summary = run(asked)
    assert summary["absent_clients"] == ["owner-w", "owner-y"]
    assert {line["client"] for line in lines(asked, kind="client")} == {1, 3}
    assert [row.late for row in simulate.dry_run(asked)] == [True, False, True, False]
    assert "never drawn: owner-w, owner-y" in report([Path(asked.out)])[0].read_text()
    with pytest.raises(ValueError, match=r"is met by 2 of 4 clients, fewer than min_clients=3"):
        run(config(f"time.deadline={1.05 * took[1]!r}", "min_clients=3", out="few"))


def test_drop_charges_a_late_client_and_leaves_its_update_out(config: Make) -> None:
    took = times(config())
    words = (f"time.deadline={1.05 * took[1]!r}", "time.late=drop")
    asked = config(*words)
    summary = run(asked)
    assert summary["late_updates"] == 4
    answers = lines(asked, kind="client")
    assert {(line["client"], line["status"]) for line in answers} == {(0, "late"), (1, "ok"), (2, "late"), (3, "ok")}
    for line in lines(asked, kind="round")[1:]:
        assert [item["client"] for item in line["late"]] == [0, 2]
        assert line["refused"] == []
        assert line["virtual_seconds"] == 1.05 * took[1]
    assert all(entry["real"]["flops"] > 0 for entry in lines(asked, "ledger.jsonl"))
    path, said = report([Path(asked.out)])
    assert "updates too late: 4" in said[0]
    assert "Updates after the deadline" in path.read_text()


def test_straggling_alone_makes_a_client_late_and_is_drawn_anew(config: Make) -> None:
    took = times(config())
    asked = config("time.straggle=0.8", f"time.deadline={1.2 * took[0]!r}", "rounds=4")
    assert run(asked)["late_updates"] > 0
    factors = [entry["clock"]["straggle"] for entry in lines(asked, "ledger.jsonl")]
    assert len(set(factors)) == 16
    for entry in lines(asked, "ledger.jsonl"):
        clock, real = entry["clock"], entry["real"]["virtual_seconds"]
        assert clock["seconds"] == clock["straggle"] * real
    late = {(line["round"], line["client"]) for line in lines(asked, kind="client") if line["status"] == "late"}
    over = {(e["round"], e["client"]) for e in lines(asked, "ledger.jsonl") if e["clock"]["seconds"] > 1.2 * took[0]}
    assert late == over


SYSTEMS = ("fedavg", "fedavg_smallest", "flex_moe", "flame", "fft_moe", "fedmoe", "flux")


@pytest.mark.parametrize("words", [(), ("time.late=drop",), *((f"algorithm={system}",) for system in SYSTEMS)])
def test_a_deadline_that_nobody_meets_is_refused_with_one_that_would_do(config: Make, words: tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"met by no client; the first that could is client [13] .*set time.deadline"
    ) as no:
        run(config("time.deadline=0.001", *words))
    assert not Path(config().out, "metrics.jsonl").exists()
    enough = str(no.value).partition("set time.deadline=")[2].partition(" ")[0]
    simulate.dry_run(config(f"time.deadline={enough}", *words))
    with pytest.raises(ValueError, match="met by no client"):
        simulate.dry_run(config(f"time.deadline={0.99 * float(enough)!r}", *words))


def test_inv10_ranks_and_a_resume_have_the_bits_and_the_times_of_one_run(config: Make, tmp_path: Path) -> None:
    words = ("time.straggle=0.6", f"time.deadline={times(config())[1]!r}", "time.late=drop", "min_clients=1")
    whole = run(config(*words, out="whole"))
    toml = tmp_path / "ranks.toml"
    toml.write_text(config(*words).to_toml())
    of_ranks = []
    for ranks in (2, 4):
        out = tmp_path / f"ranks-{ranks}"
        assert fedmoe("simulate", toml, f"ranks={ranks}", f"out={out}", "-q").returncode in (0, 1)
        of_ranks.append(json.loads((out / "summary.json").read_text()))

    class Stop(NullObserver):
        def on_round(self, round: int, rounds: int, record: object) -> None:
            if round == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate.run(config(*words, out="cut"), observer=Stop())
    resumed = simulate.resume(tmp_path / "cut", observer=NullObserver())
    for key in ("model_hash", "virtual_seconds", "late_updates"):
        assert whole[key] == resumed[key], key
        assert [found[key] for found in of_ranks] == [whole[key]] * 2, key


def test_the_time_to_a_target_is_told_alone_and_compared(config: Make) -> None:
    easy = config("time.target=100", out="easy", budgets=SLOW)
    hard = config("time.target=0.001", out="hard", budgets=SLOW)
    assert run(easy)["virtual_seconds_to_target"] == 0.0  # the warm model is there
    assert run(hard)["virtual_seconds_to_target"] is None
    page = report([Path(hard.out)])[0].read_text()
    assert "not reached" in page
    assert "virtual hours" in page
    found = {name: [figures_of(read_runs([Path(c.out)])[0], name)] for name, c in (("easy", easy), ("hard", hard))}
    for name, asked in (("easy", easy), ("hard", hard)):
        total = lines(asked, kind="round")[-1]["virtual_seconds_total"]
        assert found[name][0].spent.virtual_seconds == total
    table = markdown(rows_of(found, target=100.0))
    heads = next(line for line in table if "reached target" in line)
    assert heads.split(" | ").index("virtual time") == 6
    assert all(line.split(" | ")[6] == "0.0 s" for line in table[-2:])
