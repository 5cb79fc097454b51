"""Whether budgets were kept and whether anything trained, on known ledgers and metrics, and in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import make_run

from fedmoe_core.budget.resources import RESOURCES
from fedmoe_core.reporting.report import report
from fedmoe_core.reporting.results import remarks
from fedmoe_core.reporting.run import read_runs
from fedmoe_core.simulation.directory.health import SPENT, kept_budgets, nothing_trained, problems

OPEN = dict.fromkeys(row.attribute for row in RESOURCES.values())


def entry(client: int, *, limit: int | None, needs: int, used: int, bound: int | str | None = "same") -> dict[str, Any]:
    """A line about memory alone; ``bound`` is what bound the plan, where that is not the device's limit."""
    spent = dict.fromkeys(SPENT, 0)
    return {
        "client": client,
        "budget": {**OPEN, "memory_bytes": limit},
        **({} if bound == "same" else {"bound_by": {**OPEN, "memory_bytes": bound}}),
        "predicted": {**spent, "memory_bytes": needs},
        "real": {**spent, "memory_bytes": used, "seconds": 1.0},
    }


@pytest.mark.parametrize(
    ("entries", "over", "broken", "budgeted"),
    [
        ([entry(0, limit=10, needs=9, used=8)], 0, 0, True),
        ([entry(0, limit=None, needs=9, used=99)], 0, 0, True),
        # A budget bound the plan, and what the client really used passed it: broken, and bound all the same.
        ([entry(0, limit=10, needs=9, used=12)], 1, 1, True),
        # Nothing bound the plan, as under FedAvg: more than the device can bear, but not a broken promise.
        ([entry(0, limit=10, needs=12, used=12, bound=None)], 1, 0, False),
        # Nothing bound it and it fitted by itself.
        ([entry(0, limit=10, needs=9, used=8, bound=None)], 0, 0, True),
        # A bound of the plan's own, wider than the device's, broken too.
        ([entry(0, limit=10, needs=12, used=21, bound=20)], 1, 1, False),
        ([entry(0, limit=10, needs=12, used=12, bound=None), entry(1, limit=10, needs=9, used=11)], 2, 1, False),
        ([], 0, 0, True),
    ],
)
def test_inv1_what_bound_a_plan_decides_whether_passing_a_limit_breaks_it(
    entries: list[dict[str, Any]], over: int, broken: int, budgeted: bool
) -> None:
    found = kept_budgets(entries)
    assert (found["budget_violations"], found["budgets_broken"], found["budgeted"]) == (over, broken, budgeted)
    assert bool(found["over_budget"]) == bool(over)
    assert bool(found["broken_by"]) == bool(broken)


def test_each_client_is_named_at_its_first_time_with_the_resource_and_the_amounts() -> None:
    lines = [entry(1, limit=10, needs=9, used=12), entry(0, limit=10, needs=9, used=11)]
    lines.append(entry(1, limit=10, needs=9, used=99))
    found = kept_budgets(lines)
    assert found["broken_by"] == [
        "client 0: memory: 11 B used, 10 B allowed",
        "client 1: memory: 12 B used, 10 B allowed",
    ]


@pytest.mark.parametrize("resource", [name for name in SPENT if name in OPEN])
def test_inv1_a_cost_that_is_not_a_number_breaks_every_limit(resource: str) -> None:
    """The ledger's JSON has null for NaN."""
    line = entry(0, limit=None, needs=0, used=0)
    line["budget"][resource], line["real"][resource] = 10, None
    assert kept_budgets([line])["budgets_broken"] == 1


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 30), st.integers(0, 30), st.sampled_from(["same", None, 15])),
        max_size=6,
    )
)
def test_inv1_a_bound_plan_is_broken_exactly_where_the_client_used_more(cases: list[Any]) -> None:
    lines = [
        entry(client, limit=limit, needs=needs, used=used, bound=bound)
        for client, (limit, needs, used, bound) in enumerate(cases)
    ]
    found = kept_budgets(lines)
    limits = [limit if bound == "same" else bound for limit, _, _, bound in cases]
    assert found["budgets_broken"] == sum(
        limit is not None and used > limit for limit, (_, _, used, _) in zip(limits, cases, strict=True)
    )
    assert found["budget_violations"] == sum(max(needs, used) > limit for limit, needs, used, _ in cases)
    # Only a client whose plan was not bound by its device's limit can make a run one that no budget binds.
    unbound = [(limit, needs, used) for limit, needs, used, bound in cases if bound not in ("same", limit)]
    assert found["budgeted"] is not any(max(needs, used) > limit for limit, needs, used in unbound)


def client(status: str, *, steps: int = 3, error: str = "") -> dict[str, Any]:
    return {"type": "client", "round": 1, "client": 4, "status": status, "steps": steps, "error": error}


@pytest.mark.parametrize(
    ("answers", "applied", "said"),
    [
        ([client("ok"), client("failed")], True, ""),
        (
            [client("failed", error="nan"), client("refused")],
            False,
            "all 2 updates failed or were refused; client 4",
        ),
        ([client("failed", error="nan")], True, "round 1: nan"),
        ([client("ok"), client("failed")], False, "no round had min_clients=2 accepted updates (1 of 2 in all)"),
        ([client("ok", steps=0)], True, "no client took a training step"),
        ([], False, "no client took part"),
    ],
)
def test_a_run_in_which_nothing_trained_says_why(answers: list[dict[str, Any]], applied: bool, said: str) -> None:
    found = nothing_trained([{"type": "round"}, *answers, {"type": "round", "applied": applied}], 2)
    assert said in found
    assert bool(said) == bool(found)


def test_problems_are_sentences_and_a_good_run_has_none() -> None:
    good = kept_budgets([entry(0, limit=10, needs=9, used=8)]) | {"nothing_trained": ""}
    assert problems(good) == []
    bad = kept_budgets([entry(0, limit=10, needs=9, used=12)]) | {"nothing_trained": "no client took part"}
    assert problems(bad) == [
        "budgets were exceeded once (client 0: memory: 12 B used, 10 B allowed)",
        "nothing trained: no client took part",
    ]


def shown(path: Path) -> tuple[list[str], str]:
    """What ``fedmoe report`` prints of a run, and the page that it writes."""
    page, lines = report([path])
    return lines, page.read_text("utf-8")


def test_a_failed_run_says_so_first(tmp_path: Path) -> None:
    small = {"clients": 2, "rounds": 1}
    broken = {"budgets_broken": 3, "broken_by": ["client 1: memory: 2 MiB used, 1 MiB allowed", "client 2: down"]}
    first = make_run(tmp_path / "a", label="A", **small, **broken)
    second = make_run(tmp_path / "b", label="B", **small, nothing_trained="no client took part")
    lines, html = shown(first)
    assert "<p class='problem'>budgets were exceeded 3 times (client 1: memory: 2 MiB used" in html
    assert lines[0].endswith("budgets exceeded: 3 (client 1: memory: 2 MiB used, 1 MiB allowed; 1 more client)")
    lines, html = shown(second)
    assert "<h1>B: nothing trained</h1>" in html
    assert "<p class='problem'>nothing trained: no client took part</p>" in html
    assert lines[0].startswith("B: nothing trained (no client took part), held-out loss")
    runs = read_runs([first, second])
    assert [remarks(run, runs[0]) for run in runs] == [["exceeded a budget"], ["nothing trained"]]


def test_an_unfinished_run_is_judged_by_its_ledger(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", clients=2, rounds=1, tiers=("memory=24MiB",))
    entries = [json.loads(text) for text in (path / "ledger.jsonl").read_text().splitlines()]
    entries[0]["real"]["memory_bytes"] = 2 * entries[0]["budget"]["memory_bytes"]
    (path / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (path / "summary.json").unlink()
    lines, _ = shown(path)
    assert "budgets exceeded: 1 (client 0: memory: " in lines[0]


def test_energy_is_judged_as_the_ledger_has_it() -> None:
    line = {"client": 0, "budget": {"energy_joules": 10.0}, "predicted": {"energy_joules": 10.0}}
    kept = kept_budgets([{**line, "real": {"energy_joules": 10.0}}])
    assert (kept["budget_violations"], kept["budgets_broken"], kept["budgeted"]) == (0, 0, True)
    kept = kept_budgets([{**line, "real": {"energy_joules": 10.5}}])
    assert (kept["budget_violations"], kept["budgets_broken"], kept["budgeted"]) == (1, 1, True)
    kept = kept_budgets([{**line, "bound_by": {}, "real": {"energy_joules": 10.5}}])
    assert (kept["budget_violations"], kept["budgets_broken"], kept["budgeted"]) == (1, 0, False)
