"""Experts chosen anew for every batch: eq. 15 by brute force, slots that keep their bits, and what it all costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import EXPERTS, LAYERS, G, profiles
from tiny_corpus import make_config

from fedmoe_core.algorithms.hfedmoe import TopScores
from fedmoe_core.client import train
from fedmoe_core.client.per_batch import PerBatchSteps, SlotAdamW
from fedmoe_core.config.run_config import Config, TrainConfig
from fedmoe_core.layer.moe import MoE
from fedmoe_core.selection.importance import expert_scores
from fedmoe_core.simulation import run as simulate
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round

Make = Callable[..., Config]
BATCH = ("selection.mode=backward-masked", "selection.reschedule=batch")


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


@pytest.mark.parametrize("score", ["s", "ib"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_inv8_a_batch_gets_the_best_set_of_the_experts_it_reached(score: str, count: int) -> None:
    """Eq. 15 over all layers at once, one expert a layer, never one outside E_union but to keep a layer alive."""
    rule = TopScores(count, score, lam=0.4, beta=0.9)  # type: ignore[arg-type]
    for profile in profiles():
        profile.hits_LE[0, 0] = 0  # nobody in this batch was routed there
        scores_LE = expert_scores(profile, rule.score, lam=rule.lam, beta=rule.beta)
        places = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS) if profile.hits_LE[layer, e] > 0]
        sets = [c for size in range(LAYERS, count + 1) for c in combinations(places, size)]
        whole = [c for c in sets if {layer for layer, _ in c} == set(range(LAYERS))]
        best = max(sum(scores_LE[place] for place in chosen) for chosen in whole)
        found_LE = rule(profile)
        assert found_LE.sum() <= count
        assert found_LE.any(axis=1).all()
        assert not found_LE[0, 0]
        assert scores_LE[found_LE].sum() == pytest.approx(best, abs=1e-12)
    assert G[0].shape[0] == LAYERS


class TwoLayers:
    """As much of an adapter as the slot optimizer needs; sizes are whole vectors of every CPU, so bits can be equal."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.moe = tuple(MoE(16, 32, 4, 2) for _ in range(2))
        self.head = torch.nn.Linear(16, 16)
        self.model = torch.nn.Sequential(*self.moe, self.head)

    def backward(self, seed: int) -> None:
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
        self.model(x).square().mean().backward()

    def choose(self, *experts: int) -> None:
        for layer in self.moe:
            layer.set_experts(None, np.isin(np.arange(4), experts))

    def rows(self) -> dict[tuple[int, str, int], torch.Tensor]:
        found = {}
        for number, layer in enumerate(self.moe):
            held = layer.global_state()
            for name in ("router", "w_in", "w_out"):
                found |= {(number, name, e): getattr(held, name)[e].clone() for e in range(4)}
        return found


TRAIN = TrainConfig(lr=0.01, weight_decay=0.3)


def test_inv9_with_everybody_chosen_it_is_adamw_bit_for_bit() -> None:
    ours, plain = TwoLayers(), TwoLayers()
    slots = SlotAdamW(ours, TRAIN)  # type: ignore[arg-type]
    stock = torch.optim.AdamW(plain.model.parameters(), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay, fused=True)
    for seed in range(4):
        ours.choose(0, 1, 2, 3)
        ours.backward(seed)
        plain.backward(seed)
        slots.step()
        slots.zero_grad()
        stock.step()
        stock.zero_grad()
    for found, want in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(found, want)


def test_inv5_a_masked_expert_keeps_weights_and_moments_and_goes_on_from_there() -> None:
    model = TwoLayers()
    slots = SlotAdamW(model, TRAIN)  # type: ignore[arg-type]
    batches = [(0, 1), (1, 2), (0, 3), (1,), (0, 2)]
    seen: dict[tuple[int, str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for seed, chosen in enumerate(batches):
        model.choose(*chosen)
        before = model.rows()
        kept = {key: {n: v.clone() for n, v in state.items()} for key, state in slots.state.items()}
        model.backward(seed)
        for number, layer in enumerate(model.moe):
            for name in ("router", "w_in", "w_out"):
                gradient = getattr(layer, name).grad
                for slot, expert in enumerate(layer.trainable_experts):
                    place = (number, name, expert)
                    seen.setdefault(place, []).append((before[place], gradient[slot].clone()))
        slots.step()
        slots.zero_grad()
        after = model.rows()
        for place, row in before.items():
            assert torch.equal(after[place], row) == (place[2] not in chosen), place
            if place in kept and place[2] not in chosen:
                for name, value in kept[place].items():
                    assert torch.equal(slots.state[place][name], value), (place, name)
    # Each expert's path is that of an AdamW of its own, over the batches that chose it and no others.
    final = model.rows()
    for place, steps in seen.items():
        alone = torch.nn.Parameter(steps[0][0].clone())
        optimizer = torch.optim.AdamW([alone], lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)
        for _, gradient in steps:
            alone.grad = gradient
            optimizer.step()
        torch.testing.assert_close(final[place], alone.detach(), rtol=1e-5, atol=1e-7)
        assert float(slots.state[place]["step"]) == len(steps)
    assert not {key for key in slots.state if key[0] != "dense"} - set(seen)  # type: ignore[index]


def test_inv9_a_budget_for_everything_changes_nothing_to_rounds(config: Make) -> None:
    common = ("selection.mode=backward-masked", "budgets=experts=100%")
    once = simulate.run(config(*common, out_name="round"))
    each = simulate.run(config(*common, "selection.reschedule=batch", out_name="batch"))
    assert once["model_hash"] == each["model_hash"]


def test_inv1_every_batch_stays_inside_the_budget_and_the_rest_keeps_its_bits(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosers: list[PerBatchSteps] = []
    masks: list[np.ndarray] = []

    class Watched(PerBatchSteps):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            choosers.append(self)

        def before(self, batch: object) -> int:
            peak = super().before(batch)  # type: ignore[arg-type]
            masks.append(self.chosen_LE)
            return peak

    monkeypatch.setattr(train, "PerBatchSteps", Watched)
    world = build_world(config(*BATCH, "budgets=experts=4", "train.local_steps=4").resolved(), Ranks(), NullObserver())
    before = world.algorithm.init(world.params)
    state, round_ = play_round(world, before, NullObserver())
    assert [update.error for update in round_.updates] == [""] * 4
    assert len(masks) == 4 * 4
    assert all(mask.sum() <= 4 and mask.any(axis=1).all() for mask in masks)
    assert len({mask.tobytes() for mask in masks}) > 1, "every batch chose the same: the case shows nothing"
    trained_LE = np.any([chooser.trained_LE for chooser in choosers], axis=0)
    assert 4 < trained_LE.sum() < 16
    for layer, trained_E in enumerate(trained_LE):
        for name in ("w_in", "w_out"):
            old, new = before.params[f"moe.{layer}.{name}"], state.params[f"moe.{layer}.{name}"]
            same_E = np.array([torch.equal(old[e], new[e]) for e in range(8)])
            assert not (~same_E & ~trained_E).any(), "an expert moved that no batch chose"
            assert (~same_E).any()
    for chooser, plan, update in zip(choosers, round_.plans, round_.updates, strict=True):
        assert not (update.expert_weight_LE > 0)[~chooser.trained_LE].any()
        assert update.cost.experts == plan.predicted.experts == 4


def test_inv1_inv2_scoring_is_charged_and_memory_is_bounded(config: Make, tmp_path: Path) -> None:
    tiers = "budgets=experts=2;experts=4;experts=50%;experts=100%"
    summary = simulate.run(config(*BATCH, tiers, "train.batch_size=4"))
    assert summary["budget_violations"] == 0
    assert summary["refused_updates"] == 0
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    world = build_world(config(*BATCH, tiers, "train.batch_size=4").resolved(), Ranks(), NullObserver())
    costs = world.population.costs
    scoring = 3 * costs.forward_flops(np.ones((2, 8), dtype=bool), tokens=costs.tokens)
    for entry in ledger:
        predicted, real = entry["predicted"], entry["real"]
        # What the batches will choose is not known beforehand, so the bound is not tight.
        assert real["memory_bytes"] <= predicted["memory_bytes"] <= 1.35 * real["memory_bytes"], entry
        assert real["flops"] <= predicted["flops"]
        assert real["bytes_up"] <= predicted["bytes_up"]
        assert real["bytes_down"] == predicted["bytes_down"]
    alone = world.algorithm.plan(world.algorithm.init(world.params), range(4))
    once = costs.step_flops(np.ones((2, 8), dtype=bool), np.ones((2, 8), dtype=bool))
    for plan in alone[:3]:
        assert plan.extras.per_batch is not None
        # Scoring is an extra pass; fewer experts that learn are fewer weight gradients.
        saved = plan.local_steps * 2 * costs.expert_params * max(0, 2 * 2 - plan.extras.per_batch.count) * costs.tokens
        assert plan.predicted.flops == pytest.approx(plan.local_steps * once + scoring - saved, rel=1e-12)
    assert alone[3].extras.per_batch is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["selection.reschedule=batch"], "selection.mode=backward-masked"),
        ([*BATCH, "selection.score=taylor"], "choose s or ib"),
        ([*BATCH, "train.prox=0.1"], "selection.reschedule=round"),
    ],
)
def test_what_cannot_be_rescheduled_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config.load(None, words)


def test_inv1_a_budget_below_one_expert_a_layer_is_refused(config: Make) -> None:
    with pytest.raises(ValueError, match="client 0: experts budget 1 cannot hold one expert per MoE layer"):
        simulate.run(config(*BATCH, "budgets=experts=1"))
