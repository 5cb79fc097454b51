"""The page of many clients is small, is made in time linear in the records, and names what stands out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run

from fedmoe_core.reporting.page import render
from fedmoe_core.reporting.report import report
from fedmoe_core.reporting.run import read_runs


class Counter:
    """How many records were read and how many client numbers were compared."""

    def __init__(self) -> None:
        self.records = self.compared = 0


class Records(Sequence[Any]):
    """Records that count how often one of them is handed out."""

    def __init__(self, records: Sequence[Any], counter: Counter) -> None:
        self.records, self.counter = records, counter

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Any) -> Any:
        self.counter.records += 1
        return self.records[place]

    def __iter__(self) -> Iterator[Any]:
        for record in self.records:
            self.counter.records += 1
            yield record


def numbers(counter: Counter) -> type[int]:
    """Whole numbers that count their comparisons, as a search in a list makes them one after another."""

    class Number(int):
        def __eq__(self, other: object) -> bool:
            counter.compared += 1
            return int(self) == other

        def __hash__(self) -> int:
            return int.__hash__(self)

    return Number


def work(path: Path, clients: int) -> Counter:
    """Render a run of one round whose records and client numbers are counted."""
    counter = Counter()
    (run,) = read_runs([make_run(path, clients=clients, layers=1, experts=2, rounds=1, classification=True)])
    number = numbers(counter)
    known = [
        [{**record, "client": number(record["client"])} for record in found] for found in (run.clients, run.ledger)
    ]
    render([replace(run, clients=Records(known[0], counter), ledger=Records(known[1], counter))])
    return counter


@pytest.mark.parametrize("clients", [20, 100], ids=["each client", "by tier"])
def test_twice_the_clients_are_twice_the_work(tmp_path: Path, clients: int) -> None:
    once, twice = work(tmp_path / "once", clients), work(tmp_path / "twice", 2 * clients)
    assert 0 < twice.records <= 2 * once.records
    # Hash tables compare only where two hashes meet, at most some times a client; lists of members compared
    # 92 to 408 times a client.
    assert twice.compared <= 2 * once.compared + 4 * clients


@pytest.fixture(scope="module")
def crowd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 1,000 clients over 50 rounds, 100 in each, in whose last round client 17 is worst by far."""
    path = make_run(tmp_path_factory.mktemp("crowd") / "run", clients=1000, sampled=100, rounds=50, classification=True)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["loss_clients"][17] = 9.876
    (path / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    return path


def test_a_page_of_a_thousand_clients_and_fifty_rounds_is_small(crowd_run: Path, tmp_path: Path) -> None:
    size = report([crowd_run], out=tmp_path / "r.html")[0].stat().st_size
    assert size < 3_000_000
    few = make_run(tmp_path / "few", clients=100, sampled=10, rounds=50, classification=True)
    # Ten times the clients only fill the percentiles better.
    assert size < 1.2 * report([few], out=tmp_path / "few.html")[0].stat().st_size


def test_the_page_names_what_stands_out(crowd_run: Path, tmp_path: Path) -> None:
    html = report([crowd_run], out=tmp_path / "r.html")[0].read_text("utf-8")
    for heading in ("Losses by tier", "Which tier holds which expert", "The clients with the highest losses"):
        assert f"<h2>{heading}</h2>" in html
    assert "Every thin line is one client." not in html
    assert "Over budget in any round" not in html
    assert "worst: client 17" in html
    assert "9.876" in html
    assert "loss is NaN at step 3" in html
    assert html.count("<tr>") < 60


def test_names_in_a_crowd_are_text_and_runs_of_both_kinds_share_a_page(tmp_path: Path) -> None:
    path = make_run(tmp_path / "many", clients=50, layers=1, experts=2, rounds=2, classification=True)
    partition = json.loads((path / "partition.json").read_text())
    partition["clients"] = [f"<script>{n}</script>$x_{{{n}}}$" for n in range(50)]
    (path / "partition.json").write_text(json.dumps(partition))
    few = make_run(tmp_path / "few", clients=3, layers=1, experts=2, rounds=2, classification=True, label="few")
    html = report([few, path], out=tmp_path / "r.html")[0].read_text("utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;49&lt;/script&gt;$x_{49}$" in html
    assert "Every thin line is one client; of more than 40, the pale band holds 90 % of the clients" in html
    assert "Which client holds which expert" in html
    assert "Which tier holds which expert" in html


@pytest.mark.parametrize("missing", ["partition.json", "ledger.jsonl", "config.toml", "summary.json"])
def test_what_a_crowd_lacks_is_left_out(tmp_path: Path, missing: str) -> None:
    path = make_run(tmp_path / "run", clients=45, sampled=20, layers=1, experts=2, rounds=2, classification=True)
    (path / missing).unlink()
    html = report([path])[0].read_text("utf-8")
    assert "<h2>Losses of the clients</h2>" in html
    assert ("Ledger of round 2" in html) == (missing != "ledger.jsonl")
    assert ("holds what data" in html) == (missing != "partition.json")
