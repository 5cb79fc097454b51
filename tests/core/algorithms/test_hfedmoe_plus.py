"""HFedMoE+ and the simple rivals: what each chooses, what it leaves alone, and that budgets hold in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import PRIOR, find_algorithm, model, play, population, profiles, result_for
from tiny_corpus import make_config

from fedmoe_core.algorithms.baselines import FedAvgSmallest, MostActivated, ReapExperts
from fedmoe_core.algorithms.hfedmoe import HFedMoE
from fedmoe_core.algorithms.hfedmoe_plus import HFedMoEPlus
from fedmoe_core.algorithms.own_gates import sent_gate
from fedmoe_core.budget.limits import Cost
from fedmoe_core.comparison.study import Study
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import ALGORITHMS
from fedmoe_core.messages.result import LocalFailure
from fedmoe_core.model.spec import model_hash
from fedmoe_core.selection.knapsack import select_top_n
from fedmoe_core.server.state import ServerState, initial_state, pack_state, unpack_state
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round

Make = Callable[..., Config]
NEW = ("hfedmoe_plus", "fedavg_smallest", "most_activated", "reap_experts")


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def heard() -> ServerState:
    return replace(initial_state(model(), 3), profiles=tuple(profiles()))


def final(config: Config) -> dict[str, Any]:
    simulate.run(config)
    out = Path(config.out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"summary": json.loads((out / "summary.json").read_text()), "lines": lines}


@pytest.mark.parametrize("name", NEW)
def test_names_are_registered_with_a_card(name: str) -> None:
    assert name in ALGORITHMS
    assert find_algorithm(name, population()).card.name == name


@pytest.mark.parametrize(("name", "importance"), [(n, n) for n in ("taylor", "s", "ib", "reap", "reap_sum")])
def test_importance_is_hfedmoes_score_of_that_name_and_taylor_without_penalty(name: str, importance: str) -> None:
    ours = HFedMoEPlus(population(f"plus.importance={importance}", "selection.beta=0.7", "selection.lam=0.3"))
    beta = 0.0 if name == "taylor" else 0.7
    theirs = HFedMoE(population(f"selection.score={name}", f"selection.beta={beta}", "selection.lam=0.3"))
    for mine, other in zip(ours.scores(heard()), theirs.scores(heard()), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_hits_are_the_clients_own_choices_or_the_priors_before_it_is_heard() -> None:
    state = replace(heard(), profiles=(profiles()[0], None, None))
    ours = HFedMoEPlus(population("plus.importance=hits")).scores(state)
    rival = MostActivated(population())
    for client, known in enumerate((profiles()[0], PRIOR, PRIOR)):
        want_LE = known.hits_LE / known.tokens_L[:, None]
        np.testing.assert_array_equal(ours[client], want_LE)
        np.testing.assert_array_equal(rival.worth(state, client), want_LE)


def test_most_activated_keeps_the_largest_counts() -> None:
    facts = population(budgets=("experts=3", "experts=4", "experts=5"))
    rival = MostActivated(facts)
    for client, plan in enumerate(rival.plan(heard(), range(3))):
        want_LE = select_top_n(rival.worth(heard(), client), (3, 4, 5)[client])
        np.testing.assert_array_equal(plan.permitted_LE, want_LE)
        assert plan.budget.fits(plan.predicted)


def test_reap_experts_keep_the_largest_means_of_the_clients_own_measurements() -> None:
    """An absent expert's row is worth what public data says, and one that the client's router never chooses nothing."""
    facts = population(budgets=("experts=3", "experts=4", "experts=5"))
    rival, state = ReapExperts(facts), replace(heard(), profiles=(profiles()[0], None, profiles()[2]))
    for client, plan in enumerate(rival.plan(state, range(3))):
        mine = state.profiles[client]
        mean_LE = PRIOR.reap_sum_LE / PRIOR.rows_LE
        if mine is not None:
            served_LE = mine.rows_LE > 0
            mean_LE = np.where(served_LE, mine.reap_sum_LE / np.maximum(mine.rows_LE, 1), mean_LE) * (mine.hits_LE > 0)
        want_LE = mean_LE / mean_LE.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(rival.worth(state, client), want_LE, rtol=1e-12)
        np.testing.assert_array_equal(plan.permitted_LE, select_top_n(want_LE, (3, 4, 5)[client]))
        assert plan.budget.fits(plan.predicted)


def test_a_frozen_gate_neither_weighs_nor_moves_nor_travels_again() -> None:
    algorithm = HFedMoEPlus(population("plus.gate=frozen", budgets=("experts=4",) * 3))
    open_ = HFedMoEPlus(population(budgets=("experts=4",) * 3))
    first, second = heard(), replace(heard(), visits=(1, 1, 1))
    router = 4 * 2 * 3 * 8  # E x L x H x float64
    for state, saved in ((first, 0), (second, router)):
        frozen, moving = algorithm.plan(state, [0])[0], open_.plan(state, [0])[0]
        assert moving.predicted.bytes_down - frozen.predicted.bytes_down == saved
        assert moving.predicted.bytes_up - frozen.predicted.bytes_up == int(frozen.trainable_LE.sum()) * 3 * 8
    plan = algorithm.plan(first, [0])[0]
    with pytest.raises(ValueError, match="add router to keeps"):
        replace(plan, extras=replace(plan.extras, keeps=frozenset()))


def test_a_personal_gate_goes_on_from_its_own_rows_and_moves_the_servers_too(config: Make) -> None:
    world = build_world(config("algorithm=hfedmoe_plus", "plus.explore=0").resolved(), Ranks(), NullObserver())
    routers = [key for key in world.params if key.endswith(".router")]
    state = world.algorithm.init(world.params)
    for _ in range(2):
        plans = world.algorithm.plan(state, range(4))
        before, (state, _) = state, play_round(world, state, NullObserver())
        for plan in plans:
            started = before.memory.get(f"gate/{plan.client}", torch.stack([before.params[key] for key in routers]))
            torch.testing.assert_close(sent_gate(plan), started, rtol=0, atol=0)
            moved_LE = (state.memory[f"gate/{plan.client}"] != started).any(dim=2).numpy()
            assert not (moved_LE & ~plan.trainable_LE).any()
            assert moved_LE.any() or plan.top_k == 1  # the weight of an only choice is 1 whatever the gate says
        assert all(not torch.equal(state.params[key], before.params[key]) for key in routers)
    assert not torch.equal(state.memory["gate/0"], state.memory["gate/1"])
    deployed = world.algorithm.personal(state, 1)
    torch.testing.assert_close(sent_gate(deployed), state.memory["gate/1"], rtol=0, atol=0)


BUDGETS = ("experts=3,memory=2MiB", "experts=6", "experts=4,up=1MiB")


def test_smallest_gives_every_client_the_same_experts_in_every_round_inside_every_budget() -> None:
    facts = population(budgets=BUDGETS)
    algorithm = FedAvgSmallest(facts)
    for state in (initial_state(model(), 3), replace(heard(), round=4, visits=(2, 0, 9))):
        for plan in algorithm.plan(state, range(3)):
            np.testing.assert_array_equal(plan.permitted_LE, select_top_n(algorithm.public_scores(), 3))
            assert all(budget.fits(plan.predicted) for budget in facts.budgets)


def test_smallest_without_limits_is_fedavg() -> None:
    facts = population()
    ours, theirs = (
        find_algorithm(name, facts).plan(initial_state(model(), 3), range(3)) for name in ("fedavg_smallest", "fedavg")
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.permitted_LE, other.permitted_LE)
        assert mine.predicted == other.predicted
    a, b = (play(find_algorithm(name, facts))[0].params for name in ("fedavg_smallest", "fedavg"))
    assert all(torch.equal(a[key], b[key]) for key in a)


SETTINGS = (
    "plus.importance=ib",
    "plus.gate=row-wise",
    "plus.explore=0.1",
    "plus.hold_share=0",
)
TIERS = 'budgets=["experts=25%", "experts=50%", "experts=100%", "memory=600KiB"]'


def test_inv9_with_hfedmoes_settings_every_bit_is_hfedmoes(config: Make) -> None:
    ours = final(config("algorithm=hfedmoe_plus", "rounds=3", TIERS, *SETTINGS, out_name="plus"))
    theirs = final(config("algorithm=hfedmoe", "rounds=3", TIERS, out_name="base"))
    assert ours["summary"]["model_hash"] == theirs["summary"]["model_hash"]
    assert ours["summary"]["budget_violations"] == 0
    for key in ("loss_after", "bytes_down", "bytes_up", "flops", "peak_memory_bytes"):
        assert ours["summary"][key] == theirs["summary"][key], key


SHARES = 'budgets=["experts=25%", "experts=50%", "experts=100%"]'  # counts, so that no calibration changes a golden run
FROZEN = ("plus.gate=frozen", "plus.importance=hits")
GOLDEN = (  # words, loss after, bytes down and up, most experts held
    ("hfedmoe_plus", (), 5.73711, 880128, 621120, 16),
    ("hfedmoe_plus", FROZEN, 5.73660, 863744, 608832, 16),
    ("fedavg_smallest", (), 5.74481, 585216, 320064, 4),
    ("most_activated", (), 5.73575, 880128, 621120, 16),
)


@pytest.mark.parametrize(("name", "words", "loss", "down", "up", "most"), GOLDEN)
def test_inv1_three_rounds_hold_every_budget_and_end_where_they_did(
    config: Make, name: str, words: tuple[str, ...], loss: float, down: int, up: int, most: int
) -> None:
    run = final(config(f"algorithm={name}", "rounds=3", SHARES, *words, out_name=f"{name}-{len(words)}"))
    summary = run["summary"]
    assert summary["budgeted"] is True
    assert (summary["budget_violations"], summary["refused_updates"]) == (0, 0)
    assert summary["loss_after"] == pytest.approx(loss, abs=2e-4)  # of 5.74842; other machines round otherwise
    assert (summary["bytes_down"], summary["bytes_up"]) == (down, up)
    assert (summary["experts_held_min"], summary["experts_held_max"]) == (4, most)
    held = {str(line["held_LE"]) for line in run["lines"] if line["type"] == "client"}
    assert (len(held) == 1) is (name == "fedavg_smallest")


def test_a_frozen_gate_stays_bit_for_bit_in_a_run(config: Make) -> None:
    world = build_world(config("algorithm=hfedmoe_plus", "plus.gate=frozen").resolved(), Ranks(), NullObserver())
    state, round_ = play_round(world, world.algorithm.init(world.params), NullObserver())
    assert all(update.status == "ok" for update in round_.updates)
    for key, old in world.params.items():
        if key.endswith("router"):
            assert torch.equal(state.params[key], old)
    assert any(not torch.equal(state.params[key], old) for key, old in world.params.items() if key.endswith("w_in"))


def test_inv10_resumed_and_permuted_runs_end_at_the_same_bits(config: Make) -> None:
    whole = config("algorithm=hfedmoe_plus", "rounds=3", out_name="whole")
    simulate.run(whole)
    world = build_world(whole.resolved(), Ranks(), NullObserver())
    state = world.algorithm.init(world.params)
    plans = world.algorithm.plan(state, range(4)), world.algorithm.plan(state, [3, 1, 0, 2])
    for mine in plans[0]:
        other = next(plan for plan in plans[1] if plan.client == mine.client)
        np.testing.assert_array_equal(mine.permitted_LE, other.permitted_LE)
    packed = unpack_state(pack_state(play_round(world, state, NullObserver())[0]), round=1)
    for _ in range(2):
        packed = unpack_state(pack_state(play_round(world, packed, NullObserver())[0]), round=packed.round + 1)
    summary = json.loads((Path(whole.out) / "summary.json").read_text())
    assert model_hash(packed.params) == summary["model_hash"]


def test_a_failed_client_weighs_nothing() -> None:
    for name in NEW:
        failed = LocalFailure(Cost(flops=3.0), "loss is nan at step 1")
        after, updates = play(find_algorithm(name, population()), [result_for(0), failed, result_for(2)])
        assert (updates[1].status, updates[1].expert_weight_LE.any()) == ("failed", False)
        assert after.profiles[1] is None
        assert after.round == 1


STUDY = Path(__file__).parents[3] / "bench" / "study"


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shared_configuration_of_the_study_parses(path: Path) -> None:
    config = Config.load(path, [] if path.stem == "stdlib" else ["data=csv:news.csv"])
    assert config.clients == 12
    assert config.budgets == tuple(f"memory={share}%" for share in ("12.5", "25", "50", "100"))
    assert config.eval.personal


@pytest.mark.parametrize(("group", "head", "least"), [("plus", "hfedmoe_plus", 11), ("hfedmoe", "hfedmoe", 9)])
def test_every_variant_of_the_ablation_parses_and_differs_in_something(group: str, head: str, least: int) -> None:
    study = Study.of((), systems="all", seeds="0", out=Path("x"), variants=STUDY / "ablations" / f"{group}.toml")
    jobs = study.jobs()
    assert study.variants[0].words == (f"algorithm={head}",)
    assert len({str(job.config.decisive()) for job in jobs}) == len(jobs) >= least
