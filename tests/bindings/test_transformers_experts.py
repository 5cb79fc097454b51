"""use_fedmoe and plain sub-models against the stock models, and every refusal by name."""

import copy
import json

import numpy as np
import pytest
import torch
from stock_models import FAMILIES, LAYERS, E, batch_of, moe_names, relative, stock_loss, stock_model
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedmoe_bindings.transformers import TransformersAdapter, extract_submodel, merge_submodel, use_fedmoe
from fedmoe_bindings.transformers.stock.experts import fedmoe_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_use_fedmoe_equals_eager_and_really_runs(family, monkeypatch):
    stock, batch = stock_model(family), batch_of()
    ours = use_fedmoe(copy.deepcopy(stock))
    calls = []

    def counted(*arguments):
        calls.append(1)
        return fedmoe_experts(*arguments)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "fedmoe", counted)
    loss, want = stock_loss(ours, batch), stock_loss(stock, batch)
    assert len(calls) == len(moe_names(stock))
    assert relative(loss, want) < 1e-5
    loss.backward()
    want.backward()
    truth = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, truth[name].grad) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_inv3_use_fedmoe_under_a_mask_equals_the_submodel(family):
    stock, batch = stock_model(family), batch_of()
    plain = stock_loss(stock, batch)
    ours = use_fedmoe(copy.deepcopy(stock), permitted=np.arange(E) % 2 == 0)
    permitted = np.tile(np.arange(E) % 2 == 0, (len(moe_names(stock)), 1))
    loss = stock_loss(ours, batch)
    assert relative(loss, stock_loss(extract_submodel(stock, permitted), batch)) < 1e-5
    loss.backward()
    for name in moe_names(stock):
        block = ours.get_submodule(name)
        for grad in (block.gate.weight.grad, block.experts.gate_up_proj.grad, block.experts.down_proj.grad):
            assert not grad[1::2].any()
            assert grad[0::2].any()
    one = np.arange(E) == 4  # fewer permitted than k: the places without an expert hold transformers' own mark
    use_fedmoe(ours, permitted=one)
    assert relative(stock_loss(ours, batch), stock_loss(extract_submodel(stock, one), batch)) < 1e-5
    assert relative(stock_loss(use_fedmoe(ours), batch), plain) < 1e-5, "the mask was not lifted"


TINY_OTHERS = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    return LlamaForCausalLM(LlamaConfig(intermediate_size=16, **TINY_OTHERS))


def deepseek():
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **TINY_OTHERS,
            intermediate_size=16,
            moe_intermediate_size=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        )
    )


def doge():
    """A family without transformers' decorator: set_experts_implementation is silently without effect there."""
    sizes = TINY_OTHERS | {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 16}
    return DogeForCausalLM(DogeConfig(**sizes, num_key_value_heads=2, is_moe=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (llama, "LlamaForCausalLM is not a Mixture of Experts"),
        (
            doge,
            r"DogeForCausalLM has experts \(DogeCDMoE\), but they do not run through transformers' experts interface",
        ),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_what_was_looked_for(make, message):
    model = make()
    for serve in (use_fedmoe, TransformersAdapter, lambda m: extract_submodel(m, np.ones(4, dtype=bool))):
        with pytest.raises(ValueError, match=message):
            serve(model)


def test_the_silent_trap_of_transformers_is_there_and_is_refused():
    model = doge()
    use_fedmoe(stock_model("mixtral"))  # so that the name is known
    model.set_experts_implementation("fedmoe")  # says nothing, does nothing
    with pytest.raises(ValueError, match="do not run through transformers' experts interface"):
        use_fedmoe(model)


def test_a_family_member_without_moe_layers_or_with_unserved_options_is_refused():
    dense = stock_model("qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(ValueError, match="no MoE layer; check which of its layers are sparse"):
        TransformersAdapter(dense)
    with pytest.raises(ValueError, match="router_jitter_noise=0"):
        TransformersAdapter(stock_model("mixtral", router_jitter_noise=0.1))
    with pytest.raises(ValueError, match="an activation or a norm that fedmoe's layer does not have"):
        TransformersAdapter(stock_model("mixtral", hidden_act="mish"))
    with pytest.raises(ValueError, match="no language-model head"):
        TransformersAdapter(stock_model("olmoe", cls=OlmoeModel))


@pytest.mark.parametrize("family", FAMILIES)
def test_submodel_saves_loads_trains_and_merges_back(family, tmp_path):
    stock, batch = stock_model(family), batch_of()
    layers = len(moe_names(stock))
    permitted_LE = np.stack([np.isin(np.arange(E), ids) for ids in ([0, 2], [1, 5], [3, 4])])[:layers]
    sub = extract_submodel(stock, permitted_LE)
    assert sub.num_parameters() < stock.num_parameters()
    sub.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["fedmoe_kept_experts"] == [[0, 2], [1, 5], [3, 4]][:layers]
    loaded = type(stock).from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), sub.state_dict().values(), strict=True))
    assert relative(stock_loss(loaded, batch), stock_loss(sub, batch)) < 1e-6
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert merge_submodel(stock, loaded) is stock
    for name, value in stock.state_dict().items():
        if ".gate.weight" in name or ".experts." in name:
            number = [block + "." in name for block in moe_names(stock)].index(True)
            moved = [not torch.equal(value[e], before[name][e]) for e in range(E)]
            assert moved == permitted_LE[number].tolist(), name
        else:
            assert torch.equal(value, before[name] + 1.0), name


def test_submodels_that_cannot_be_are_refused():
    stock = stock_model("mixtral")
    uneven = np.ones((LAYERS, E), dtype=bool)
    uneven[1, :3] = False
    with pytest.raises(ValueError, match="layers keep 3 to 6 experts"):
        extract_submodel(stock, uneven)
    with pytest.raises(ValueError, match="layer 2 has no permitted expert"):
        extract_submodel(stock, np.arange(LAYERS * E).reshape(LAYERS, E) < 12)
    with pytest.raises(ValueError, match=r"permitted is int64 of shape \(6,\)"):
        use_fedmoe(stock, permitted=np.arange(E))
    sub = extract_submodel(stock, np.arange(E) < 3)
    with pytest.raises(ValueError, match="another mask"):
        merge_submodel(stock, sub, np.arange(E) > 2)
    with pytest.raises(ValueError, match="pass the mask"):
        merge_submodel(stock, stock_model("mixtral", seed=1))
