"""FFT-MoE, FLAME, HetLoRA and FlexLoRA: each equation as wired, against a plain re-statement."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_runs import TIERS, Make, gammas, heard_by, started
from lora_restated import flame_weights, hetlora_weights, pruned_rank
from tiny_corpus import make_config

from fedmoe_core.algorithms.fft_moe import HeterogeneityLoss, jensen_shannon, label_skew, routing_target
from fedmoe_core.algorithms.lora.factors import Factors, flame_share
from fedmoe_core.algorithms.lora.rank_tail import TailLoss, squared_norm
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import AuxLoss, SwitchBalance
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.round import play_round


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def test_fft_k_is_the_largest_that_the_flops_pay(config: Make) -> None:
    world, state = started(config, "fft_moe", "fft_moe.experts=6", "fft_moe.top_k=4", "budgets=unlimited")
    costs, spec = world.population.costs, world.adapter.spec
    all_LE = np.ones((spec.num_layers, spec.num_experts), dtype=bool)
    per_step = [costs.step_flops(all_LE, all_LE, top_k=k) for k in (1, 2, 3, 4)]
    each = per_step[1] - per_step[0]
    np.testing.assert_allclose([b - a for a, b in pairwise(per_step)], each)
    for limit in (per_step[0] * 1.0001, per_step[1] * 0.9999, per_step[1] * 1.0001, per_step[2] * 1.1, 1e12):
        budget = replace(world.population.budgets[0], flops=3 * limit)
        facts = replace(world.population, budgets=(budget,) * 4)
        k = type(world.algorithm)(facts).plan(state, [0])[0].top_k
        assert k == np.clip(np.floor((limit - (per_step[0] - each)) / each), 1, 4)


def test_fft_loss_is_its_formula() -> None:
    torch.manual_seed(0)
    layers = [MoE.from_dense(torch.randn(5, 8), torch.randn(5, 4, 8), torch.randn(5, 8, 4), k, activation="relu")
              for k in (2, 2)]  # fmt: skip
    target_LE = np.random.default_rng(0).dirichlet(np.ones(5), 2)
    x = torch.randn(17, 8)

    def loss_of(loss: AuxLoss) -> float:
        with recording(layers) as tape:
            for layer in layers:
                layer(x)
            return float(loss(tape).detach())

    wanted = 0.0
    for layer, target_E in zip(layers, target_LE, strict=True):
        g_TE = (x @ layer.router_EH().T).detach().double().softmax(-1).numpy()
        f_E = np.zeros(5)
        for g_E in g_TE:
            f_E[np.argsort(g_E)[-2:]] += 1 / 17
        p_E = g_TE.mean(axis=0)
        wanted += (0.3 * 5 * (f_E * p_E).sum() / 2 + 0.7 * (p_E * np.log(p_E / target_E)).sum()) / 2
    found = loss_of(HeterogeneityLoss(balance=0.3, pull=0.7, target_LE=target_LE))
    assert found == pytest.approx(wanted, rel=1e-5)
    even = loss_of(HeterogeneityLoss(balance=1.0, pull=0.0, target_LE=target_LE))
    assert even == pytest.approx(loss_of(SwitchBalance(1.0)), rel=1e-6)


def test_fft_skew_and_target(config: Make) -> None:
    uniform = np.full(4, 0.25)
    assert jensen_shannon(uniform, uniform) == 0
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1)
    p = np.array([0.7, 0.2, 0.1, 0])
    m = (p + uniform) / 2
    wanted = (
        0.5 * sum(a * np.log2(a / c) for a, c in zip(p, m, strict=True) if a)
        + 0.5 * (uniform * np.log2(uniform / m)).sum()
    )
    assert jensen_shannon(p, uniform) == pytest.approx(wanted)
    seen_LE = np.array([[0.8, 0.2, 0.0]])
    np.testing.assert_allclose(routing_target(seen_LE, 0.0, shape=(1, 3)), 1 / 3)
    np.testing.assert_allclose(routing_target(None, 1.0, shape=(1, 3)), 1 / 3)
    np.testing.assert_allclose(routing_target(seen_LE, 1.0, shape=(1, 3)), seen_LE, atol=2e-6)
    np.testing.assert_allclose(routing_target(seen_LE, 0.4, shape=(1, 3)), 0.6 / 3 + 0.4 * seen_LE)
    world, state = started(config, "fft_moe", "budgets=unlimited", "fft_moe.balance=0.5", labeled=True)
    for plan in world.algorithm.plan(state, range(3)):
        h = label_skew(world.population, plan.client)
        assert 0 < h < 1
        assert isinstance(plan.extras.aux, HeterogeneityLoss)
        assert plan.extras.aux.balance == pytest.approx(0.5 * (1 - h))
    first, _ = play_round(world, state, NullObserver())
    second, played = play_round(world, first, NullObserver())
    for update in played.updates:
        assert update.profile is not None
        now_LE = update.profile.prob_sum_LE / update.profile.tokens_L[:, None]
        key = f"routing/{update.client}"
        np.testing.assert_allclose(second.memory[key].numpy(), (first.memory[key].numpy() + now_LE) / 2)


@pytest.mark.parametrize("mode", ["fedavg", "usage"])
def test_fft_aggregation_is_the_weighted_mean(config: Make, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world, state = started(config, "fft_moe", TIERS, f"fft_moe.aggregation={mode}", "aggregation.scale_bits=30",
                           "aggregation.weight_bits=28")  # fmt: skip
    after, seen = heard_by(world, state, monkeypatch)
    samples_C = world.population.samples_C
    gamma_CLE = gammas(seen, samples_C, temperature=2.0 if mode == "usage" else 0.0)
    for key in ("moe.1.w_in", "moe.1.w_out"):
        step = sum(torch.from_numpy(gamma_CLE[c, 1])[:, None, None] * u.deltas[key] for c, (_, _, u) in seen.items())
        torch.testing.assert_close(after.params[key], (state.params[key] + step).float(), rtol=0, atol=1e-6)
    shares = samples_C / samples_C.sum()
    step = sum(shares[c] * u.deltas["moe.0.router"] for c, (_, _, u) in seen.items())
    torch.testing.assert_close(after.params["moe.0.router"], (state.params["moe.0.router"] + step).float(), rtol=0,
                               atol=1e-6)  # fmt: skip


def test_flame_shares_normalize_to_gamma() -> None:
    rng = np.random.default_rng(0)
    rows_CLE, steps_C, samples_C = (
        rng.integers(0, 90, (3, 2, 4)).astype(float),
        np.array([2, 3, 4]),
        np.array([5, 9, 2]),
    )
    rows_CLE[:, 0, 1] = 0
    for t in (0.0, 1.0, 2.0, 4.0):
        share_CLE = np.stack(
            [flame_share(rows_CLE[c], steps=int(steps_C[c]), tokens=64, samples=samples_C[c] / 9, temperature=t)
             for c in range(3)]
        )  # fmt: skip
        assert (share_CLE <= 1).all()
        total_LE = share_CLE.sum(axis=0)
        np.testing.assert_allclose(
            share_CLE / np.where(total_LE > 0, total_LE, 1), flame_weights(rows_CLE, steps_C, samples_C, temperature=t)
        )


def test_flame_scales_start_at_k_over_ki_learn_and_stay_with_the_client(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, state = started(config, "flame", TIERS, "aggregation.scale_bits=30", "aggregation.weight_bits=28")
    assert [plan.extras.out_scale_L for plan in world.algorithm.plan(state, range(4))] == [(2.0, 2.0)] * 2 + [
        (1.0, 1.0)
    ] * 2
    after, seen = heard_by(world, state, monkeypatch)
    for plan in world.algorithm.plan(after, range(4)):
        kept = [float(seen[plan.client][1].kept[f"moe.{layer}.out_scale"]) for layer in range(2)]
        assert plan.extras.out_scale_L == pytest.approx(kept, rel=1e-6)
        assert kept != [2.0, 2.0]
        assert kept != [1.0, 1.0]
    gamma_CLE = gammas(seen, world.population.samples_C, temperature=2.0)
    for key in ("moe.0.a_in", "moe.1.b_out"):
        layer = int(key[4])
        step = sum(
            torch.from_numpy(gamma_CLE[c, layer])[:, None, None] * u.deltas[key] for c, (_, _, u) in seen.items()
        )
        torch.testing.assert_close(after.params[key], (state.params[key] + step).float(), rtol=0, atol=1e-6)
    assert all(torch.equal(after.params[f"moe.0.w_{side}"], state.params[f"moe.0.w_{side}"]) for side in ("in", "out"))
    first, second = (plans[3].predicted.bytes_down for plans in
                     (world.algorithm.plan(state, range(4)), world.algorithm.plan(after, range(4))))  # fmt: skip
    assert second < first  # the frozen model travels once
    weak, strong = (seen[c][0].predicted for c in (0, 3))
    assert weak.flops < strong.flops
    assert (weak.bytes_up, weak.experts) == (strong.bytes_up, strong.experts)  # saves arithmetic, not traffic


def test_hetlora_is_the_norm_weighted_mean_of_zero_padded_factors(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, state = started(config, "hetlora", TIERS, "aggregation.scale_bits=30", "aggregation.weight_bits=28")
    for _ in range(2):
        before = state
        state, seen = heard_by(world, before, monkeypatch)
    for layer in range(2):
        products = []
        trained: dict[str, list[torch.Tensor]] = {}
        for plan, result, _ in seen.values():
            squares = torch.zeros(8, dtype=torch.float64)
            for side in ("in", "out"):
                keys = [f"moe.{layer}.{letter}_{side}" for letter in "ab"]
                a, b = (before.params[key] for key in keys)
                a, b = (
                    a[:, : plan.extras.lora_rank] + result.deltas[keys[0]],
                    b[..., : plan.extras.lora_rank] + result.deltas[keys[1]],
                )
                squares += torch.linalg.matrix_norm((b @ a).double()) ** 2
                whole = [torch.zeros_like(before.params[key]) for key in keys]
                whole[0][:, : plan.extras.lora_rank], whole[1][..., : plan.extras.lora_rank] = a, b
                for key, factor in zip(keys, whole, strict=True):
                    trained.setdefault(key, []).append(factor)
            products.append(squares.sqrt())
        weights_CE = torch.stack(products) / torch.stack(products).sum(dim=0)
        for key, factors in trained.items():
            mean = sum(w[:, None, None] * f.double() for w, f in zip(weights_CE, factors, strict=True))
            torch.testing.assert_close(state.params[key], mean.float(), rtol=0, atol=2e-6)
    for plan, result, update in seen.values():
        shrunk = float(result.probed["tail_after"]) < float(result.probed["tail_before"])
        left = max(1, int(0.99 * plan.extras.lora_rank)) if shrunk else plan.extras.lora_rank
        assert update.private["ranks"].tolist() == [plan.extras.lora_rank, left]
        following = world.algorithm.plan(state, [plan.client])[0]
        assert following.extras.lora_rank == left


def test_hetlora_pieces_are_those_of_lora() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [Factors(torch.randn(3, r, 6, generator=generator), torch.randn(3, 5, r, generator=generator))
                for r in (2, 4)]  # fmt: skip
    norms = torch.stack([squared_norm(adapter).sqrt() for adapter in adapters])
    torch.testing.assert_close(norms / norms.sum(dim=0), hetlora_weights(adapters), rtol=1e-5, atol=0)
    before, after = adapters[1], Factors(adapters[1].a, adapters[1].b * torch.tensor([1, 1, 1, 0.5]))
    assert pruned_rank(before, after, keep_share=0.99) == 3


def test_hetlora_tail_fades_under_its_regulariser(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tails = []
    for weight in (0.0, 50.0):
        world, state = started(config, "hetlora", "budgets=unlimited", f"lora.tail={weight}", "lora.keep_share=0.5")
        plans = world.algorithm.plan(state, range(4))
        assert all(isinstance(plan.extras.aux, TailLoss) == (weight > 0) for plan in plans)
        for _ in range(2):
            state, seen = heard_by(world, state, monkeypatch)
        tails.append(np.mean([float(result.probed["tail_after"]) for _, result, _ in seen.values()]))
    assert tails[1] < tails[0]


def test_flexlora_sums_products_exactly_and_sends_singular_directions(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, state = started(config, "flexlora", TIERS, "aggregation.scale_bits=30", "aggregation.weight_bits=28")
    base = {key: tensor.clone() for key, tensor in state.params.items()}
    shares = world.population.samples_C / world.population.samples_C.sum()
    for _ in range(2):  # the second round starts from sent adapters and replaces the sum
        state, seen = heard_by(world, state, monkeypatch)
        for key in ("moe.0.w_in", "moe.1.w_out"):
            names = [key.replace(".w_", f".{letter}_") for letter in "ab"]
            total = torch.zeros_like(base[key])
            for client, (_, result, _) in seen.items():
                a, b = (result.kept[name] for name in names)
                total += shares[client] * 2.0 * (b @ a)  # alpha / rank = 16 / 8
            torch.testing.assert_close(state.params[key], base[key] + total, rtol=0, atol=2e-6)
            u, s, v = torch.linalg.svd((state.params[key] - base[key]).double(), full_matrices=False)
            for plan in world.algorithm.plan(state, range(4)):
                rank = plan.extras.lora_rank
                assert torch.equal(plan.extras.rows[key][3], base[key][3])
                sent = 2.0 * plan.extras.rows[names[1]][3] @ plan.extras.rows[names[0]][3]
                best = u[3, :, :rank] @ torch.diag(s[3, :rank]) @ v[3, :rank]
                torch.testing.assert_close(sent, best.float(), rtol=0, atol=1e-6)
