"""What a client is charged for, and what is said of it: when training fails, and when a budget is broken in truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import make_config

from fedmoe_core.budget.peak_memory import MemoryTrace
from fedmoe_core.client import step
from fedmoe_core.client import train as client
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.cohorts import training

Make = Callable[..., Config]


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.parametrize("ending", ["the second step raises", "the second loss is nan"])
def test_a_failed_client_is_charged_for_what_it_used(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    simulate.run(config("rounds=1", out_name="whole"))

    class Failing(client.Stepper):
        taken = 0

        def step(self, batch: Batch) -> float:
            loss = super().step(batch)  # as where memory runs out at the end of a step
            self.taken += 1
            if self.taken == 2 and "raises" in ending:
                raise RuntimeError("out of memory")
            return float("nan") if self.taken == 2 else loss

    monkeypatch.setattr(client, "Stepper", Failing)
    simulate.run(config("rounds=1", out_name="failed"))
    wholes, entries = (lines(tmp_path / name, "ledger.jsonl") for name in ("whole", "failed"))
    for whole, entry in zip(wholes, entries, strict=True):
        used, real, predicted = entry["real"], whole["real"], entry["predicted"]
        assert used["bytes_down"] == real["bytes_down"] > 0
        assert used["bytes_up"] == 0
        assert used["experts"] == real["experts"] > 0
        assert 0.99 * real["memory_bytes"] <= used["memory_bytes"] <= predicted["memory_bytes"]
        # Two of three steps; the one that raised is charged in full, so the sum may pass what the rows come to.
        assert real["flops"] / 2 < used["flops"] <= predicted["flops"] * 2 / 3
        assert used["seconds"] > 0


def test_a_client_that_fails_before_its_first_step_is_charged_for_what_it_was_sent(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no optimizer")

    monkeypatch.setattr(step, "local_optimizer", broken)
    simulate.run(config("rounds=1"))
    for entry in lines(tmp_path / "run", "ledger.jsonl"):
        used, predicted = entry["real"], entry["predicted"]
        assert used["bytes_down"] == predicted["bytes_down"] > 0
        assert 0 < used["memory_bytes"] <= predicted["memory_bytes"]
        assert (used["flops"], used["bytes_up"]) == (0, 0)


@pytest.mark.parametrize("clients", [{2}, {0, 1, 2, 3}])
def test_inv1_a_budget_that_is_broken_is_said_to_be_broken(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: set[int]
) -> None:
    """The closed form falls short (here: by what the test adds to the measurement)."""
    trace_memory, who = client.trace_memory, {"client": -1}
    train_client = training.train_client

    def more(step: Callable[[], Any], device: torch.device) -> tuple[Any, MemoryTrace]:
        result, trace = trace_memory(step, device)
        return result, replace(trace, peak=trace.peak * (2 if who["client"] in clients else 1))

    def train(adapter: Any, params: Any, plan: ExpertPlan, batches: Any, **rest: Any) -> LocalResult:
        who["client"] = plan.client
        return train_client(adapter, params, plan, batches, **rest)

    monkeypatch.setattr(client, "trace_memory", more)
    monkeypatch.setattr(training, "train_client", train)
    budget = max(row.predicted.memory_bytes for row in simulate.dry_run(config("budgets=experts=50%")))
    summary = simulate.run(config(f"budgets=memory={budget}"))
    assert (summary["budgets_broken"], summary["budget_violations"]) == (2 * len(clients), 2 * len(clients))
    assert summary["budgeted"]
    assert [line.partition(":")[0] for line in summary["broken_by"]] == [f"client {c}" for c in sorted(clients)]
    assert bool(summary["nothing_trained"]) == (len(clients) == 4)
    assert summary["refused_updates"] == 2 * len(clients)
