"""Switch Transformers in the simulator: its encoder under a head, equal to the stock one, and every system on it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import relative
from test_pretrained_run import save_checkpoint
from tiny_corpus import make_config, write_topics
from transformers import (
    MixtralConfig,
    PhimoeConfig,
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    SwitchTransformersForConditionalGeneration,
)

from fedmoe_bindings.transformers import TransformersAdapter, load_adapter
from fedmoe_bindings.transformers.live.load import without_chance
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import ALGORITHMS
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.simulation import prepare
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import play_round
from fedmoe_core.simulation.run import run

STACKS = (("w_in", "wi"), ("w_out", "wo"))
SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_experts": 8,
}


def save_switch(folder: Path, **options: Any) -> Path:
    """A whole tiny model, encoder and decoder, as its makers save it: with dropout and jitter in its configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(**{"vocab_size": 320} | SIZES | options)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_switch(tmp_path_factory.mktemp("switch"))


def opened(saved: Path, **options: object) -> TransformersAdapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_adapter(str(saved), task="classification", num_classes=3, **options)  # type: ignore[arg-type]


def batch_of(length: int = 20) -> Batch:
    tokens = torch.randint(3, 300, (4, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) < torch.tensor([[length], [length - 3], [length // 2], [4]])
    return Batch(tokens * mask, mask, torch.tensor([0, 1, 2, 0]))


def stock(saved: Path) -> SwitchTransformersEncoderModel:
    return SwitchTransformersEncoderModel.from_pretrained(saved, dropout_rate=0.0, router_jitter_noise=0.0).eval()


def sparse_blocks(model: SwitchTransformersEncoderModel) -> list[Any]:
    return [block.layer[1].mlp for block in model.encoder.block if hasattr(block.layer[1].mlp, "router")]


def grad_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Zeros for an expert that no token chose."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def test_its_encoder_under_a_head_is_the_stock_encoder_with_every_gradient(saved: Path) -> None:
    adapter, model, batch = opened(saved), stock(saved), batch_of()
    assert (adapter.spec.num_layers, adapter.spec.num_experts, adapter.spec.top_k) == (2, 8, 1)
    assert adapter.spec.activation == "relu"
    hidden = model(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).last_hidden_state
    pooled = (hidden * batch.mask_SN[..., None]).sum(1) / batch.mask_SN.sum(1, keepdim=True)
    want = torch.nn.functional.cross_entropy(pooled @ adapter.model.score.weight.detach().T, batch.labels_S)
    want.backward()
    found = adapter.loss(batch)
    found.backward()
    assert relative(found, want) < 1e-5
    for layer, block in zip(adapter.moe, sparse_blocks(model), strict=True):
        grads = {
            name: torch.stack([grad_of(getattr(e, place).weight) for e in block.experts.values()])
            for name, place in STACKS
        }
        grads["router"] = block.router.classifier.weight.grad
        for name, grad in grads.items():
            assert relative(getattr(layer, name).grad, grad) < 1e-4, name
    theirs = dict(model.named_parameters())
    for name, parameter in adapter.model.model.named_parameters():
        if name in theirs:
            assert relative(parameter.grad, theirs[name].grad) < 1e-4, name
    assert adapter.moe[0].last_stats.hits_E.sum() == batch.mask_SN.sum(), "padding was routed"


def test_it_comes_back_as_the_stock_encoder_to_the_bit(saved: Path, tmp_path: Path) -> None:
    adapter, model = opened(saved), stock(saved)
    adapter.export(head=False).save_pretrained(tmp_path)
    again = SwitchTransformersEncoderModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"export\(head=False\)"):
        adapter.export()


def test_fewer_experts_are_the_stock_encoder_without_the_others(saved: Path) -> None:
    adapter, batch = opened(saved), batch_of()
    held = torch.tensor([[True, False] * 4, [False, True] * 4]).numpy()
    adapter.configure(adapter.state(), SubModel(permitted_LE=held))
    found = adapter.evaluate(batch).loss_sum
    model = stock(saved)
    with torch.no_grad():
        for mask, block in zip(held, sparse_blocks(model), strict=True):
            block.router.classifier.register_forward_hook(
                lambda _, __, logits, mask=mask: logits.masked_fill(~torch.from_numpy(mask), -torch.inf)
            )
        hidden = model(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).last_hidden_state
        pooled = (hidden * batch.mask_SN[..., None]).sum(1) / batch.mask_SN.sum(1, keepdim=True)
        want = torch.nn.functional.cross_entropy(pooled @ adapter.model.score.weight.T, batch.labels_S, reduction="sum")
    assert abs(found - float(want)) < 1e-4 * float(want)


def test_what_is_left_out_of_it_is_said(saved: Path, tmp_path: Path) -> None:
    with pytest.warns(
        match="trained without dropout_rate=0.1, router_jitter_noise=0.01: a simulated step has no chance"
    ):
        adapter = load_adapter(str(saved), task="classification", num_classes=3)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in adapter.model.modules())
    assert adapter.export(head=False).config.dropout_rate == 0.0
    with pytest.raises(ValueError, match="has an encoder and a decoder; fedmoe trains its encoder, as a classifier"):
        load_adapter(str(saved), task="causal_lm")
    noisy = SwitchTransformersEncoderModel(SwitchTransformersConfig(vocab_size=320, **SIZES, router_jitter_noise=0.0))
    with pytest.raises(ValueError, match="drop values at random"):
        TransformersAdapter(noisy, task="classification", num_classes=3)
    other = save_switch(tmp_path, dense_act_fn="mish")
    with pytest.raises(ValueError, match="have an activation that fedmoe's layer does not have"):
        opened(other)


def test_a_sequence_beyond_the_capacity_loses_no_token(tmp_path: Path) -> None:
    """transformers drops what finds no room; megablocks, and the layers here, drop nothing."""
    adapter = opened(save_switch(tmp_path, expert_capacity=1))
    batch = batch_of()
    adapter.evaluate(batch, with_stats=True)
    assert adapter.moe[0].last_stats.hits_E.sum() == batch.mask_SN.sum()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_system_trains_it(
    algorithm: str,
    saved: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make: Callable[..., Config] = make_config(tmp_path, tmp_path_factory.getbasetemp() / "switch-cache")
    monkeypatch.setattr(prepare, "find_adapter", lambda name: lambda _, **options: opened(saved, seed=options["seed"]))
    budget = "unlimited" if algorithm in ("fedavg", "fft_moe") else "memory=70%"
    world = build_world(
        make(f"algorithm={algorithm}", f"budgets={budget}", "rounds=1", "warmup.steps=0", labeled=True).resolved(),
        Ranks(),
        NullObserver(),
    )
    state = world.algorithm.init(world.params)
    before = state.params
    state, round_ = play_round(world, state, NullObserver())
    assert [update.error for update in round_.updates] == [""] * len(round_.updates)
    for update, plan in zip(round_.updates, round_.plans, strict=True):
        for name in ("memory_bytes", "flops", "bytes_down", "bytes_up"):
            assert getattr(update.cost, name) <= getattr(plan.predicted, name), (name, update.cost, plan.predicted)
    assert any(not torch.equal(old, state.params[key]) for key, old in before.items())


def test_a_checkpoint_from_disk_is_fine_tuned_by_budgeted_clients(tmp_path: Path) -> None:
    tokenizer = save_checkpoint(tmp_path / "other", "mixtral")
    save_switch(tmp_path / "model", vocab_size=tokenizer.get_vocab_size())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "model")
    topics = write_topics(tmp_path / "topics.csv")
    settings = [
        *(
            f"data=csv:{topics}",
            f"model={tmp_path / 'model'}",
            f"out={tmp_path / 'run'}",
            f"cache={tmp_path / 'cache'}",
        ),
        *("threads=1", "clients=3", "rounds=2", "train.batch_size=4", "train.seq_len=16", "train.local_steps=4"),
        *("budgets=experts=50%", "train.lr=1e-2", "warmup.head_steps=5"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = run(Config.load(None, settings))
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["budget_violations"] == 0


def test_an_encoder_is_not_trained_to_predict_what_it_sees(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"sees the tokens that it would have to predict; set warmup\.steps=0"):
        opened(saved).text_loss(batch_of())


def test_attention_is_that_of_the_blocks_that_have_experts_whatever_was_run_before(saved: Path) -> None:
    adapter, batch = opened(saved), batch_of(12)
    adapter.evaluate(batch_of(20))  # whose token mask would not fit
    found_LSN = adapter.attention_received(batch)
    model = SwitchTransformersEncoderModel.from_pretrained(saved, attn_implementation="eager").eval()
    mask_SN = batch.mask_SN
    told = model(input_ids=batch.tokens_SN, attention_mask=mask_SN.long(), output_attentions=True).attentions
    sparse = [number for number, block in enumerate(model.encoder.block) if hasattr(block.layer[1].mlp, "router")]
    maps = [told[number].mean(dim=1) * mask_SN[:, :, None] for number in sparse]
    want_LSN = torch.stack([m.sum(dim=1) / mask_SN.sum(dim=1, keepdim=True) * mask_SN for m in maps])
    assert relative(found_LSN, want_LSN) < 1e-5


def test_chance_is_taken_out_of_every_part_of_a_configuration() -> None:
    """A part may leave open what another sets."""
    config = MixtralConfig(attention_dropout=0.1, path_dropout=0.2)
    config.text_config = MixtralConfig(attention_dropout=0.3, path_dropout=None)
    with pytest.warns(match=r"trained without attention_dropout=0\.3, path_dropout=0\.2: a simulated step"):
        without_chance(config, "made up")
    assert (config.attention_dropout, config.path_dropout) == (0.0, 0.0)
    assert (config.text_config.attention_dropout, config.text_config.path_dropout) == (0.0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without_chance(config, "made up")


def test_a_threshold_that_is_called_jitter_is_no_chance() -> None:
    config = PhimoeConfig(router_jitter_noise=0.02, input_jitter_noise=0.1, resid_pdrop=0.3)
    with pytest.warns(match=r"trained without input_jitter_noise=0\.1, resid_pdrop=0\.3: a simulated step"):
        without_chance(config, "made up")
    assert (config.router_jitter_noise, config.input_jitter_noise, config.resid_pdrop) == (0.02, 0.0, 0.0)
