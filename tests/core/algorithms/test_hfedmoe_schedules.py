"""Lambda, beta and tau that move over a run: each round is the round of a run with that round's constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hand_made import model, plan_for, population, profiles, result_for

from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.algorithms.hfedmoe_plus import HFedMoEPlus
from fedmoe_core.config.run_config import Config
from fedmoe_core.server.state import ServerState, initial_state

MOVING = (
    "rounds=5",
    "selection.lam=0.2",
    "selection.lam_change=0.6",
    "selection.beta=0.8",
    "selection.beta_change=-0.8",
    "aggregation.tau=0.0",
    "aggregation.tau_change=0.2",
)


def standing(number: int) -> tuple[str, ...]:
    """The same run's words if it stood still in that round: equal steps from the first value to the last."""
    lam, beta, tau = 0.2 + 0.15 * number, 0.8 - 0.2 * number, 0.05 * number
    return "rounds=5", f"selection.lam={lam}", f"selection.beta={abs(round(beta, 9))}", f"aggregation.tau={tau}"


def heard(number: int) -> ServerState:
    return replace(initial_state(model(), 3), profiles=tuple(profiles()), round=number)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("score", ["s", "ib", "taylor"])
def test_scores_of_a_round_are_those_of_its_lambda_and_beta(score: str, number: int) -> None:
    word = f"selection.score={score}"
    moving, still = (HFedMoE(population(word, *words)) for words in (MOVING, standing(number)))
    for mine, other in zip(moving.scores(heard(number)), still.scores(heard(number)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)
    first = moving.scores(heard(0))
    assert number == 0 or any((a != b).any() for a, b in zip(first, moving.scores(heard(number)), strict=True))


@pytest.mark.parametrize("number", range(5))
def test_weights_of_a_round_are_those_of_its_lambda_and_tau(number: int) -> None:
    votes = []
    for client in range(3):
        plan = replace(plan_for(client), round=number)
        mine, other = (
            HFedMoE(population(*words)).answer(plan, result_for(client)) for words in (MOVING, standing(number))
        )
        np.testing.assert_array_equal(mine.expert_weight_LE, other.expert_weight_LE)
        np.testing.assert_allclose(mine.router_weight_LE, other.router_weight_LE, rtol=1e-9)
        votes.append(int((mine.expert_weight_LE > 0).sum()))
    if number == 4:
        assert sum(votes) < sum(
            int((HFedMoE(population(*MOVING)).answer(plan_for(c), result_for(c)).expert_weight_LE > 0).sum())
            for c in range(3)
        )


def test_per_batch_choice_takes_the_rounds_lambda_and_beta() -> None:
    words = ("selection.mode=backward-masked", "selection.reschedule=batch", "selection.score=ib")
    rule = HFedMoE(population(*words, *MOVING, budgets=("experts=3",))).per_batch(heard(2), 0).extras.per_batch
    assert rule is not None
    assert (rule.lam, rule.beta) == pytest.approx((0.5, 0.4))


def test_taylor_importance_of_plus_has_no_penalty_in_any_round() -> None:
    moving, still = HFedMoEPlus(population(*MOVING)), HFedMoEPlus(population("rounds=5"))
    for mine, other in zip(moving.scores(heard(3)), still.scores(heard(3)), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["selection.lam=0.7", "selection.lam_change=0.4"], r"selection.lam \+ selection.lam_change is 1.1"),
        (["selection.beta_change=-0.2"], r"selection.beta \+ selection.beta_change is -0.1"),
        (["aggregation.tau_change=-0.1"], r"aggregation.tau \+ aggregation.tau_change is -0.1"),
    ],
)
def test_a_schedule_that_leaves_its_bounds_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.load(None, words)


def test_a_schedule_is_written_read_and_decides_results(tmp_path: Path) -> None:
    moving, file = Config.load(None, MOVING), tmp_path / "config.toml"
    file.write_text(moving.to_toml())
    assert Config.load(file) == moving
    for word in MOVING[2::2]:
        key = word.partition("=")[0]
        assert list(Config.load(None, [*MOVING, f"{key}=0.0"]).diff(moving)) == [key]
