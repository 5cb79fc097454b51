"""Looks without gradients: losses by place and by expert, attention received, experts in few bits, and their cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import make_config
from torch import Tensor

from fedmoe_core.algorithms.flux.four_bit_profile import QuantizedProfile, profile_cost
from fedmoe_core.budget.passes import coded, pass_cost
from fedmoe_core.client.profiling import run_probe, validate
from fedmoe_core.client.train import train_client
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.recording import recording
from fedmoe_core.messages.plan import Extras, ProbeContext
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.server.planning import plan_of_masks
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world, local_public_batches
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.world import World
from fedmoe_kernels.formats import FORMATS

Make = Callable[..., Config]
WIDE = ("model_config.hidden_size=64", "model_config.expert_width=32", "train.batch_size=4")


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return make_config(tmp_path, tmp_path_factory.getbasetemp() / "tiny")


def made(config: Make, *words: str, labeled: bool = False) -> tuple[World, Batch]:
    world = build_world(config(*words, "budgets=unlimited", labeled=labeled).resolved(), Ranks(), NullObserver())
    world.adapter.configure(world.params)
    batch = next(iter(local_public_batches(world.config, world.data, 1)))
    ragged = batch.mask_SN.clone()
    ragged[1, 9:] = False
    return world, Batch(batch.tokens_SN, ragged, batch.labels_S)


@pytest.mark.parametrize("labeled", [False, True])
def test_losses_by_place_add_up_to_the_evaluation(config: Make, labeled: bool) -> None:
    world, batch = made(config, labeled=labeled)
    prior_C = torch.linspace(-2.0, 1.0, world.adapter.model.score.out_features) if labeled else None
    plain = world.adapter.evaluate(batch, log_prior_C=prior_C)
    places = world.adapter.place_losses(batch, log_prior_C=prior_C)
    assert (places.total.count, places.total.correct) == (plain.count, plain.correct)
    assert places.total.loss_sum == pytest.approx(plain.loss_sum, rel=1e-6)
    assert places.loss_SN.shape == places.correct_SN.shape == places.counted_SN.shape == batch.tokens_SN.shape
    assert not places.counted_SN[~batch.mask_SN].any()
    if labeled:
        assert float(places.loss_SN[:, 0].sum()) == pytest.approx(plain.loss_sum, rel=1e-6)
        assert int(places.correct_SN[:, 0].sum()) == plain.correct
    else:
        assert float(places.loss_SN[places.counted_SN].sum()) == pytest.approx(plain.loss_sum, rel=1e-6)


@pytest.mark.parametrize("labeled", [False, True])
def test_feedback_is_the_mean_fate_of_those_who_chose_the_expert(config: Make, labeled: bool) -> None:
    world, batch = made(config, labeled=labeled)
    found = validate(world.adapter, [batch, batch])
    places = world.adapter.place_losses(batch)
    for number, layer in enumerate(world.adapter.moe):
        with recording([layer]) as tape:
            world.adapter.place_losses(batch)
            chosen_TK = tape.choices(0)
        for expert in range(layer.num_experts):
            picked_SN = (chosen_TK == expert).any(dim=1).view(batch.tokens_SN.shape) & places.counted_SN
            assert found.feedback.rows_LE[number, expert] == 2 * int(picked_SN.sum())
            want = 2 * float(places.loss_SN[picked_SN].double().sum())
            assert found.feedback.loss_LE[number, expert] == pytest.approx(want, rel=1e-6, abs=1e-9)
            assert found.feedback.correct_LE[number, expert] == 2 * int(places.correct_SN[picked_SN].sum())
    if labeled:
        assert found.feedback.rows_LE.sum() == 2 * 2 * int(batch.mask_SN.sum()) * world.adapter.spec.num_layers


@pytest.mark.parametrize("labeled", [False, True])
def test_attention_received_is_the_mean_over_heads_and_later_places(config: Make, labeled: bool) -> None:
    world, batch = made(config, labeled=labeled)
    before = world.adapter.evaluate(batch)
    got_LSN = world.adapter.attention_received(batch)
    trunk = world.adapter.model.model if labeled else world.adapter.model
    assert trunk.config._attn_implementation == "sdpa"
    assert world.adapter.evaluate(batch) == before
    trunk.set_attn_implementation("eager")
    maps = trunk(
        input_ids=batch.tokens_SN,
        attention_mask=batch.mask_SN.long(),
        use_cache=False,
        output_attentions=True,
        fedmoe_token_mask_T=batch.mask_SN.reshape(-1),
    ).attentions
    assert got_LSN.shape == (world.adapter.spec.num_layers, *batch.tokens_SN.shape)
    for layer, map_SANN in enumerate(maps):
        for s in range(len(batch)):
            real = np.flatnonzero(batch.mask_SN[s].numpy())
            for n in range(batch.tokens_SN.shape[1]):
                later = [i for i in real if i >= n]
                want = map_SANN[s, :, later, n].mean().item() if n in real else 0.0
                assert float(got_LSN[layer, s, n]) == pytest.approx(want, abs=1e-6)


def test_a_mixed_up_place_would_show(config: Make) -> None:
    """The attention of the first place of a sequence is all its own: a check of the axes above."""
    world, batch = made(config)
    alone = Batch(batch.tokens_SN[:, :1], batch.mask_SN[:, :1])
    assert torch.allclose(world.adapter.attention_received(alone), torch.ones(2, len(batch), 1))


@dataclass(frozen=True)
class Look:
    """Who is chosen, with all experts in few bits."""

    form: str | None

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        nobody_LE = np.zeros((2, 8), dtype=bool)
        context.adapter.configure(context.params, SubModel(trainable_LE=nobody_LE, frozen_format=self.form))
        found = validate(context.adapter, context.batches())
        stored = sum(layer.w_in_frozen.nbytes + layer.w_out_frozen.nbytes for layer in context.adapter.moe)
        return {"rows": torch.from_numpy(found.profile.rows_LE), "stored": torch.tensor(stored)}


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_inv2_a_look_in_few_bits_stays_within_its_closed_form(config: Make, form: str | None) -> None:
    world, _ = made(config, *WIDE)
    state, costs = world.algorithm.init(world.params), world.population.costs
    every_LE, few_LE = np.ones((2, 8), dtype=bool), np.zeros((2, 8), dtype=bool)
    few_LE[:, :2] = True
    cost = pass_cost(costs, every_LE, tokens=3 * costs.tokens, form=form)
    plan = plan_of_masks(world.population, state, 0, few_LE, extras=Extras(before=Look(form), surcharge=cost))
    batches = list(local_public_batches(world.config, world.data, 3))
    context = ProbeContext(world.adapter, state.params, plan, world.config.train, lambda: batches, tuple)
    _, peak = run_probe(Look(form), context, torch.device("cpu"))
    # The form takes the transients of a training step for those of a forward: up to 2.2 times high in few bits.
    assert peak <= cost.memory_bytes <= (1.6 if form is None else 2.2) * peak
    result = train_client(
        world.adapter, state.params, plan, batches, train=world.config.train, costs=costs, redraw=lambda: batches
    )
    assert isinstance(result, LocalResult), result.error
    assert result.cost.memory_bytes <= plan.predicted.memory_bytes
    assert int(result.probed["rows"].sum()) == 2 * 2 * 3 * int(batches[0].mask_SN.sum())
    whole = 16 * costs.expert_params
    assert int(result.probed["stored"]) == (whole * 4 if form is None else whole * FORMATS[form].bits // 8)
    assert all(layer.w_in_scale is None for layer in world.adapter.moe), "training was in few bits too"
    if form is not None:
        exact = sum(w * (FORMATS[form].bits / 8 + 4 / c) for c, w in ((64, 64 * 64), (32, 64 * 32)))
        assert coded(costs, form).held_bytes == int(np.ceil(exact)) + costs.slot_bytes
        assert cost.memory_bytes < pass_cost(costs, every_LE, tokens=1).memory_bytes


@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_inv2_a_look_at_wide_experts_pays_for_the_matrix_that_is_made_of_codes(config: Make, form: str | None) -> None:
    """Without it, and the stack beside its parts, 4 bits took up to 2.4 times what was predicted."""
    wide = ("model_config.hidden_size=256", "model_config.expert_width=256", "train.seq_len=12")
    world, _ = made(config, *wide)
    every_LE = np.ones((2, 8), dtype=bool)
    cost = pass_cost(world.population.costs, every_LE, tokens=1, form=form)
    batches = list(local_public_batches(world.config, world.data, 2))
    state = world.algorithm.init(world.params)
    plan = plan_of_masks(world.population, state, 0, every_LE)
    context = ProbeContext(world.adapter, state.params, plan, world.config.train, lambda: batches, tuple)
    _, peak = run_probe(Look(form), context, torch.device("cpu"), afresh=True)
    assert peak <= cost.memory_bytes <= 1.15 * peak


def test_inv1_the_profile_of_flux_holds_its_experts_in_4_bits(config: Make) -> None:
    """In float32 all experts take more than the profile is charged."""
    world, _ = made(config, "model_config.hidden_size=256", "model_config.expert_width=256")
    charged = profile_cost(world.population)
    assert charged is not None
    batches = list(local_public_batches(world.config, world.data, 1))
    state = world.algorithm.init(world.params)
    plan = plan_of_masks(world.population, state, 0, np.ones((2, 8), dtype=bool))
    context = ProbeContext(world.adapter, state.params, plan, world.config.train, lambda: batches, tuple)
    _, peak = run_probe(QuantizedProfile(), context, torch.device("cpu"), afresh=True)
    assert peak <= charged.memory_bytes


@dataclass(frozen=True)
class OwnLoss:
    """What the client itself makes of its trained classifier."""

    def __call__(self, context: ProbeContext) -> dict[str, Tensor]:
        assert context.log_prior_C is not None
        found = context.adapter.evaluate(next(iter(context.validation())), log_prior_C=context.log_prior_C)
        return {"loss": torch.tensor(found.loss_sum), "prior": context.log_prior_C}


def test_a_client_judges_its_classifier_with_the_class_shares_of_its_training(config: Make) -> None:
    world, batch = made(config, "train.logit_adjustment=0.5", "algorithm=fedmoe", labeled=True)
    state, spec = world.algorithm.init(world.params), world.adapter.spec
    every_LE = np.ones((spec.num_layers, spec.num_experts), dtype=bool)
    plan = plan_of_masks(world.population, state, 0, every_LE, extras=Extras(after=OwnLoss(), validate=True))
    shares_C = np.linspace(1.0, 3.0, world.adapter.model.score.out_features)
    shares_C /= shares_C.sum()
    result = train_client(
        world.adapter,
        state.params,
        plan,
        [batch],
        train=world.config.train,
        costs=world.population.costs,
        class_shares_C=shares_C,
        validation=lambda: [batch],
    )
    assert isinstance(result, LocalResult), result.error
    np.testing.assert_allclose(result.probed["prior"], 0.5 * np.log(shares_C), rtol=1e-6)
    assert result.validation.loss_sum == pytest.approx(float(result.probed["loss"]), rel=1e-6)
    assert result.validation.loss_sum != pytest.approx(world.adapter.evaluate(batch).loss_sum, rel=1e-3)


def test_choices_are_forgotten_after_a_look(config: Make) -> None:
    world, batch = made(config)
    validate(world.adapter, [batch])
    for layer in world.adapter.moe:
        assert isinstance(layer, MoE)
        assert layer.recorder is None
