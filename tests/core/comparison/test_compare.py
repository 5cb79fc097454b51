"""The table of a comparison on runs that never happened, whose right answers are known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from synthetic_run import TIERS, make_run

from fedmoe_core.base.files import plain
from fedmoe_core.comparison.compare import write
from fedmoe_core.comparison.run_figures import RunFigures, figures_of
from fedmoe_core.comparison.study import Study, write_record
from fedmoe_core.comparison.table import markdown, rows_of
from fedmoe_core.reporting.run import read_runs

GAINS = {"hfedmoe": 0.3, "random": 0.1, "fedavg": 0.02}


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Path]]:
    return {
        name: [
            make_run(tmp_path / "runs" / name / f"seed-{seed}", algorithm=name, seed=seed, gain=gain + seed / 500)
            for seed in range(3)
        ]
        for name, gain in GAINS.items()
    }


def measures(runs: dict[str, list[Path]]) -> dict[str, list[RunFigures]]:
    return {name: [figures_of(read_runs([path])[0], name) for path in paths] for name, paths in runs.items()}


def test_measures_of_a_run_restate_its_records(runs: dict[str, list[Path]]) -> None:
    path = runs["hfedmoe"][0]
    found = figures_of(read_runs([path])[0], "x")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["type"] == "round"]
    last = rounds[-1]["loss_clients"]
    assert not found.accuracy
    assert found.clients == pytest.approx(sum(last) / len(last))
    for place, tier in enumerate(TIERS):
        assert found.tier_worst[tier] == max(last[place :: len(TIERS)])
        assert found.tier_mean[tier] == pytest.approx(sum(last[place :: len(TIERS)]) / len(last[place :: len(TIERS)]))
    held = [sum(map(sum, line["held_LE"])) for line in lines if line["type"] == "client" and line["client"] % 4 == 0]
    assert found.tier_held[TIERS[0]] == pytest.approx(sum(held) / len(held))
    assert found.spent.rounds == 8
    assert found.spent.bytes_moved == rounds[-1]["bytes_down_total"] + rounds[-1]["bytes_up_total"]
    assert found.load_cv == pytest.approx(sum(line["load_cv"] for line in rounds[1:]) / 8)


def test_the_price_of_a_target_is_that_of_the_first_round_that_reaches_it(runs: dict[str, list[Path]]) -> None:
    found = figures_of(read_runs([runs["hfedmoe"][0]])[0], "x")
    spent, quality = found.curve[3]
    at = found.to_target(quality)
    assert at is not None
    assert at.rounds <= spent.rounds
    assert found.to_target(-1.0) is None
    assert found.to_target(1e9) == found.curve[0][0]


def test_the_table_tests_ranks_and_prices(runs: dict[str, list[Path]]) -> None:
    rows = rows_of(measures(runs))
    by = {row.label: row for row in rows}
    assert by["hfedmoe"].qualities["clients"].best
    assert not by["random"].qualities["clients"].best
    assert by["random"].qualities["clients"].against_subject.significant
    assert by["hfedmoe"].qualities["clients"].against_subject is None
    assert (by["hfedmoe"].reached, by["fedavg"].reached, by["fedavg"].to_target) == (3, 0, None)
    text = "\n".join(markdown(rows))
    assert "0 of 3" in text
    assert "**" in text
    assert all(tier in text for tier in TIERS)


def test_the_target_lies_half_way_from_the_best_start_to_the_best_end_of_its_seed(runs: dict[str, list[Path]]) -> None:
    known = measures(runs)
    found = {row.label: row for row in rows_of(known)}
    for label, of_seed in known.items():
        prices = []
        for run in of_seed:
            alike = [other for each in known.values() for other in each if other.seed == run.seed]
            goal = (min(other.start for other in alike) + min(other.clients for other in alike)) / 2
            prices += [spent.bytes_moved for spent in [run.to_target(goal)] if spent is not None]
        assert found[label].reached == len(prices)
        if prices:
            assert found[label].to_target.bytes_moved == pytest.approx(sum(prices) / len(prices))
            assert min(prices) > 0
    assert all(row.reached == 3 for row in rows_of(known, target=1e9))


def test_lower_tiers_are_the_first_half_and_weigh_the_same(runs: dict[str, list[Path]]) -> None:
    known = measures(runs)
    row = rows_of(known)[0]
    each = [sum(run.tier_mean[tier] for tier in TIERS[:2]) / 2 for run in known["hfedmoe"]]
    assert len(TIERS) == 4
    assert row.qualities["lower tiers"].value.mean == pytest.approx(sum(each) / len(each))


def test_a_system_that_no_budget_binds_is_shown_but_never_best(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    for path in runs["hfedmoe"]:
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps({**summary, "budgeted": False}))
    rows = rows_of(measures(runs))
    assert not rows[0].qualities["clients"].best
    assert rows[1].qualities["clients"].best  # random beats FedAvg here
    assert "hfedmoe (not inside the budgets)" in "\n".join(markdown(rows))


def test_a_system_without_a_global_model_is_not_applicable_there(runs: dict[str, list[Path]]) -> None:
    for path in runs["random"]:
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["type"] == "round":
                line["loss"] = None
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = rows_of(measures(runs))
    assert rows[1].qualities["global"].value is None
    assert rows[1].qualities["clients"].value is not None
    assert "n/a" in "\n".join(markdown(rows))


def test_everything_is_written_from_finished_runs(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    study = Study.of([], systems="hfedmoe,random,fedavg", seeds="0-2", out=tmp_path, workers=1)
    lines = write(study, study.jobs())
    assert (tmp_path / "table.md").read_text() == "\n".join(lines) + "\n"
    record = json.loads((tmp_path / "compare.json").read_text())
    assert [row["label"] for row in record["rows"]] == ["hfedmoe", "random", "fedavg"]
    assert len(record["runs"]["random"]) == 3
    for figure in ("tiers", "learning"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000


def test_nothing_finished_is_nothing_written(tmp_path: Path) -> None:
    study = Study.of([], systems="fedavg", seeds="0", out=tmp_path, workers=1)
    assert write(study, []) == []
    assert not (tmp_path / "compare.json").exists()


def test_labels_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ablation.toml"
    file.write_text('[systems]\n"score s" = ["algorithm=hfedmoe", "selection.score=s"]\nplain = ["algorithm=fedavg"]\n')
    study = Study.of([], systems="all", seeds="0", out=tmp_path, variants=file)
    assert [variant.label for variant in study.variants] == ["score s", "plain"]


def test_an_earlier_comparison_stands_beside_a_new_system(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    """The same table, test by test, as if all had been run together; the system that is run here is not doubled."""
    whole = Study.of([], systems="hfedmoe,random,fedavg", seeds="0-2", out=tmp_path, workers=1)
    write(whole, whole.jobs())
    first = json.loads((tmp_path / "compare.json").read_text())
    record = tmp_path / "earlier.json"
    earlier = {**first, "runs": {**first["runs"], "hfedmoe": first["runs"]["fedavg"]}}  # to be replaced by our own
    record.write_text(json.dumps(earlier))
    study = Study.of([], systems="hfedmoe", seeds="0-2", out=tmp_path, workers=1, beside=record)
    write(study, study.jobs())
    second = json.loads((tmp_path / "compare.json").read_text())
    assert second["rows"] == first["rows"]
    assert second["runs"] == first["runs"]
    assert second["beside"] == {"record": str(record), "systems": ["random", "fedavg"]}
    assert second["systems"] == first["systems"]
    own = Study.of(["plus.explore=0.5"], systems="hfedmoe", seeds="0-2", out=tmp_path, workers=1, beside=record)
    assert own.beside is not None  # nobody in the record reads [plus]
    last = Study.of([], systems="hfedmoe,fedavg", seeds="0-2", out=tmp_path, workers=1, beside=record)
    write(last, last.jobs())
    assert [row["label"] for row in json.loads((tmp_path / "compare.json").read_text())["rows"]] == list(first["runs"])
    fewer = Study.of([], systems="hfedmoe", seeds="1", out=tmp_path, workers=1, beside=record)
    assert [run.seed for run in fewer.runs_beside()["random"]] == [1]


def recorded(study: Study, runs: dict[str, list[Path]]) -> Path:
    """The record alone, without the seconds that its figures take."""
    known = {name: of_seed for name, of_seed in measures(runs).items() if name in ("hfedmoe", "random")}
    write_record(study, known, rows_of(known))
    return study.out / "compare.json"


@pytest.mark.parametrize(
    ("words", "seeds", "message"),
    [
        (["rounds=3"], "0-2", "rounds = 20 then, 3 now"),
        (["rounds=20", "selection.beta=0.5"], "0-2", "another configuration .selection.beta = 0.1 then, 0.5 now.;"),
        (["rounds=20"], "0-3", "lacks seed 3 of random"),
        (None, "0-2", "was not written by this version"),
    ],
)
def test_another_comparison_is_refused_before_anything_runs(
    runs: dict[str, list[Path]], tmp_path: Path, words: list[str] | None, seeds: str, message: str
) -> None:
    whole = Study.of(["rounds=20"], systems="hfedmoe,random", seeds="0-2", out=tmp_path, workers=1)
    record = recorded(whole, runs)
    if words is None:
        record.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=message):
        Study.of(words or ["rounds=20"], systems="hfedmoe", seeds=seeds, out=tmp_path, workers=1, beside=record)


def test_runs_of_another_number_of_threads_do_not_stand_beside(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    whole = Study.of([], systems="hfedmoe,random", seeds="0-2", out=tmp_path, workers=1)
    record = recorded(whole, runs)
    record.write_text(json.dumps({**json.loads(record.read_text()), "threads": whole.threads + 1}))
    with pytest.raises(ValueError, match="threads a run and not"):
        Study.of([], systems="hfedmoe", seeds="0-2", out=tmp_path, workers=1, beside=record)


def test_measures_come_back_from_json(runs: dict[str, list[Path]]) -> None:
    known = measures(runs)["random"][0]
    odd = replace(known, peak_ratio=(float("nan"), 1.0), whole=None)
    assert RunFigures.of(json.loads(json.dumps(asdict(known)))) == known
    back = RunFigures.of(plain(asdict(odd)))
    assert math.isnan(back.peak_ratio[0])
    assert replace(back, peak_ratio=known.peak_ratio) == replace(odd, peak_ratio=known.peak_ratio)
