"""The dry run of many clients: a line a tier on the terminal, every client on demand and for programs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from plan_rows import ROW
from typer.testing import CliRunner

from fedmoe_core.base import show
from fedmoe_core.cli import main
from fedmoe_core.simulation.observer import GroupRow, PlanRow


def rows(clients: int, *, tiers: int = 2) -> list[PlanRow]:
    """Clients with 8 to 10 experts and 300 rows or more; the 60th and every 60th after it cannot run."""
    return [
        replace(
            ROW,
            client=f"client {number}",
            experts_held=(4, 4 + number % 3),
            samples=300 + number,
            budget=replace(
                ROW.budget, memory_bytes=1 << 20 if number % 60 == 59 else 24 << 20, name=f"t{number % tiers}"
            ),
        )
        for number in range(clients)
    ]


def plan(simulator: Any, found: list[PlanRow], *words: str) -> Any:
    simulator.dry_run = lambda config: found
    return CliRunner().invoke(main.app, ["plan", *words])


def test_a_thousand_clients_are_a_line_a_tier_with_ranges(simulator: Any) -> None:
    result = plan(simulator, rows(1000))
    assert result.exit_code == 2  # some cannot run, which the table comes before
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert lines[0] == [
        *("500", "t0", "8–10", "9", "20.0 MiB / 24.0 MiB", "1.00 MiB / 2.00 MiB", "879 KiB", "30.0 GFLOP"),
        *("8", "2", "300–1298", "yes"),
    ]
    assert lines[1][:2] == ["500", "t1"]
    assert lines[1][4] == "20.0 MiB / 1.00 MiB–24.0 MiB"
    assert lines[1][-1] == "16 do not"
    assert [line[0] for line in lines[2:]] == [f"client {number}" for number in range(59, 660, 60)][:10]
    assert "6 more do not fit; --all shows every client, --json all numbers" in result.stdout


def test_every_client_is_there_on_demand_and_for_programs(simulator: Any) -> None:
    shown = plan(simulator, rows(show.MANY + 1), "--all").stdout
    assert [f"client {number} " in shown for number in range(show.MANY + 1)] == [True] * (show.MANY + 1)
    assert "--all" not in shown
    assert "client 5 " in plan(simulator, rows(show.MANY)).stdout
    assert "client 5 " not in plan(simulator, rows(show.MANY + 1)).stdout
    told = json.loads(plan(simulator, rows(100), "--json").stdout)
    assert [client["client"] for client in told["clients"]] == [f"client {number}" for number in range(100)]


def test_a_budget_for_each_client_is_not_a_line_for_each(simulator: Any) -> None:
    shown = plan(simulator, rows(59, tiers=59)).stdout
    assert "20 other tiers" in shown
    assert sum("│" in line for line in shown.splitlines()) == show.MANY


def grouped(cohorts: int) -> list[PlanRow]:
    """Pairs of clients, and one client alone."""
    pairs = [GroupRow((f"[red]{n}", f"other {n}"), (20 + n) << 20) for n in range(cohorts)]
    groups = [*pairs, GroupRow(("last",), 9 << 20, "it chooses experts for every batch")]
    return [replace(ROW, client=name, group=group) for group in groups for name in group.clients]


def test_the_groups_of_the_first_round_are_a_table_of_their_own(simulator: Any) -> None:
    assert "cohort" not in plan(simulator, rows(3)).stdout
    assert "groups" not in json.loads(plan(simulator, rows(3), "--json").stdout)
    shown = plan(simulator, [*grouped(2), *rows(1)]).stdout
    assert "first round: 2 cohorts, 1 client alone" in shown
    assert "[red]1, other 1" in shown
    assert "last: it chooses experts for every batch" in shown
    assert "21.0 MiB" in shown
    told = json.loads(plan(simulator, [*grouped(1), *rows(1)], "--json").stdout)
    assert told["groups"] == [
        {"clients": ["[red]0", "other 0"], "predicted_bytes": 20 << 20, "alone": ""},
        {"clients": ["last"], "predicted_bytes": 9 << 20, "alone": "it chooses experts for every batch"},
    ]


def test_many_groups_are_a_line_a_size_and_reason(simulator: Any) -> None:
    shown = plan(simulator, grouped(show.MANY)).stdout
    assert f"first round: {show.MANY} cohorts, 1 client alone" in shown
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert lines[-2:] == [
        [str(show.MANY), "2", "20.0 MiB–59.0 MiB", ""],
        ["1", "1", "9.00 MiB", "it chooses experts for every batch"],
    ]
    assert "other 3" in plan(simulator, grouped(show.MANY), "--all").stdout
