"""Whether a run kept its budgets and whether anything trained in it, from the lines of its ledger and its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fedmoe_core.budget.limits import Budget, Cost

SPENT = tuple(field.name for field in fields(Cost))


def kept_budgets(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Judge the lines of a ledger.

    Returns:
        budget_violations: lines with more than the device can bear, predicted or real, whether a budget bound the plan
            or not; over_budget names each client's first.
        budgets_broken: lines whose real cost passed a limit that bound the plan; broken_by names each client's first.
        budgeted: False where a client needed more than its device can bear of something that did not bind its plan, as
            FedAvg's may.
    """
    over = {number: found for number, entry in enumerate(entries) if (found := _excess(entry))}
    broken = {number: found for number, entry in enumerate(entries) if (found := _broken(entry))}
    return {
        "budget_violations": len(over),
        "over_budget": _first_of(over, entries),
        "budgets_broken": len(broken),
        "broken_by": _first_of(broken, entries),
        "budgeted": not any(map(_unbound, entries)),
    }


def nothing_trained(records: Sequence[Mapping[str, Any]], min_clients: int) -> str:
    """Say why no training entered the model in the whole run; empty where some did.

    Args:
        records: lines of metrics.jsonl.
        min_clients: accepted updates without which a round is not applied.
    """
    answers = [line for line in records if line["type"] == "client"]
    accepted = [line for line in answers if line["status"] == "ok"]
    if not answers:
        return "no client took part"
    if not accepted:
        first = answers[0]
        why = f"client {first['client']} in round {first['round']}: {first['error']}"
        late = any(line["status"] == "late" for line in answers)
        return (
            f"all {len(answers)} updates failed{', were refused or came late' if late else ' or were refused'}; {why}"
        )
    if not any(line.get("applied") for line in records):
        return f"no round had min_clients={min_clients} accepted updates ({len(accepted)} of {len(answers)} in all)"
    if not any(line["steps"] for line in accepted):
        return "no client took a training step"
    return ""


def problems(summary: Mapping[str, Any]) -> list[str]:
    """Say in sentences what makes a finished run a failed one: broken budgets, nothing trained."""
    found = []
    if broken := summary.get("budgets_broken"):
        first = (summary.get("broken_by") or ["unknown client"])[0]
        found.append(f"budgets were exceeded {'once' if broken == 1 else f'{broken} times'} ({first})")
    if idle := summary.get("nothing_trained"):
        found.append(f"nothing trained: {idle}")
    return found


def _excess(entry: Mapping[str, Any]) -> list[str]:
    """What a line needs more of than its client's device can bear, predicted first."""
    budget = Budget.of(entry.get("budget") or {})
    return [found for kind in ("predicted", "real") for found in budget.violations(_cost(entry, kind))]


def _broken(entry: Mapping[str, Any]) -> list[str]:
    """What a client really used more of than the limits that bound its plan: those of its budget, or its own."""
    return Budget.of(entry.get("bound_by", entry.get("budget")) or {}).violations(_cost(entry, "real"))


def _unbound(entry: Mapping[str, Any]) -> bool:
    """Whether a line needs more than the device can bear of something that did not bind its plan."""
    limits = entry.get("budget") or {}
    bound = entry.get("bound_by", limits)
    loose = Budget.of({key: limit for key, limit in limits.items() if bound.get(key) != limit})
    return not all(loose.fits(_cost(entry, kind)) for kind in ("predicted", "real"))


def _first_of(found: Mapping[int, Sequence[str]], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which clients needed more than their limits and by how much, one line each, at their first time."""
    first = {entries[number]["client"]: found[number][0] for number in reversed(list(found))}
    return [f"client {client}: {first[client]}" for client in sorted(first)]


def _cost(entry: Mapping[str, Any], part: str) -> Cost:
    # NaN is null in JSON; it has to count as too much, as it does in ``Budget.violations``.
    spent: dict[str, Any] = {
        key: math.nan if value is None else value for key, value in (entry.get(part) or {}).items()
    }
    return Cost(**{key: spent.get(key, 0) for key in SPENT})
