"""The figures that sinks keep: of all clients, of each tier as budgets are dealt in turn, and of a summary."""

from __future__ import annotations

import pytest

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation.sinks.figures import figures_of, summary_figures

CONFIG = Config.load(overrides=["clients=5", "budgets=experts=25%; experts=50%"])
LINE = {
    "type": "round",
    "round": 3,
    "loss": 2.0,
    "accuracy": None,
    "loss_clients": [1.0, 2.0, 3.0, None, 5.0],
    "bytes_down_total": 7,
    "refused": [{"client": 3, "reason": "loss is NaN"}],
    "importance_LE": [[0.1, 0.9], [0.5, 0.5]],
    "applied": True,
}


def test_figures_of_a_round() -> None:
    found = figures_of(LINE, CONFIG)
    assert found.values == {"loss": 2.0, "worst_client_loss": 5.0, "bytes_down_total": 7.0, "refused": 1.0}
    assert found.tiers == {
        "experts=25%": {"loss": 3.0, "worst_client_loss": 5.0},
        "experts=50%": {"loss": 2.0, "worst_client_loss": 2.0},
    }
    assert found.importance_LE == [[0.1, 0.9], [0.5, 0.5]]


def test_a_round_that_was_not_evaluated_has_no_tiers_and_hidden_numbers_are_absent() -> None:
    found = figures_of({"round": 1, "seconds": 0.5, "loss": None, "importance_LE": [[0.1, None]]}, CONFIG)
    assert (found.values, found.tiers, found.importance_LE) == ({"seconds": 0.5, "refused": 0.0}, {}, ())


def test_own_models_stand_in_where_there_is_no_global_one() -> None:
    line = {
        "round": 1,
        "loss": None,
        "loss_clients": None,
        "personal_loss_C": [1.0, 3.0],
        "personal_accuracy_C": [0.5, 0.25],
    }
    found = figures_of(line, CONFIG)
    assert found.values["own_models_loss"] == 2.0
    assert (found.values["worst_client_loss"], found.values["worst_client_accuracy"]) == (3.0, 0.25)
    assert found.tiers["experts=50%"] == {"loss": 3.0, "worst_client_loss": 3.0, "accuracy": 0.25}


def test_late_updates_are_counted_where_there_is_a_deadline() -> None:
    speeds = "budgets=experts=25%,speed=2e9,downlink=10Mbit,uplink=5Mbit"
    config = Config.load(overrides=["time.deadline=3", speeds])
    assert figures_of({"round": 1}, config).values["late"] == 0.0
    assert figures_of({"round": 1, "late": [{"client": 0, "seconds": 4.0}]}, config).values["late"] == 1.0
    assert "late" not in figures_of({"round": 1}, CONFIG).values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "text", [1.0]])
def test_a_summary_gives_its_finite_numbers(value: object) -> None:
    summary = {"rounds": 3, "loss_after": 1.5, "budgeted": True, "odd": value}
    assert summary_figures(summary) == {"rounds": 3.0, "loss_after": 1.5, "budgeted": 1.0}
