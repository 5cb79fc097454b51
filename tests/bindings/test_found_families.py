"""What the adapter finds out about a family by itself: it equals the stock model, and exports it again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from everything import load_everything
from stock_models import SIZES, VOCAB, E, batch_of
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core.model.submodel import SubModel


def qwen2() -> PreTrainedModel:
    more = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": E, "use_cache": False}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(intermediate_size=20, **more, **SIZES))


def deepseek() -> PreTrainedModel:
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 2},
        intermediate_size=20,
        moe_intermediate_size=12,
        n_routed_experts=E,
        n_shared_experts=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,  # the first layer is a dense one
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        use_cache=False,
    )
    model = DeepseekV3ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


FAMILIES = {"qwen2": qwen2, "deepseek": deepseek}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adapter_is_the_stock_model_and_exports_it_again(name: str) -> None:
    torch.manual_seed(0)
    stock = FAMILIES[name]().eval()
    adapter = TransformersAdapter(copy.deepcopy(stock))
    batch = batch_of()
    inputs = {"input_ids": batch.tokens_SN, "attention_mask": batch.mask_SN.long()}
    with torch.no_grad():
        want = stock(**inputs).logits[batch.mask_SN]
        got = adapter.model(**inputs).logits[batch.mask_SN]
    assert float((got - want).norm() / want.norm()) < 1e-5
    state = adapter.state()
    assert set(state) == set(adapter.spec.keys)
    assert {key for key in state if ".shared." in key} == set(), "shared experts have their stock names"
    assert any("shared_expert" in key for key in state)
    again = adapter.export().state_dict()
    assert all(torch.equal(value, again[key]) for key, value in stock.named_parameters())
    assert all(torch.equal(value, again[key]) for key, value in stock.named_buffers() if "correction" in key)


def test_a_sub_model_of_everything_trains_what_its_plan_says() -> None:
    adapter = load_everything("tiny", vocab_size=VOCAB)
    state, spec = adapter.state(), adapter.spec
    held_LE = np.zeros((spec.num_layers, spec.num_experts), dtype=bool)
    held_LE[:, [1, 4, 7]] = True
    learns_LE = held_LE & (np.arange(spec.num_experts) != 4)
    adapter.configure(state, SubModel(permitted_LE=held_LE, trainable_LE=learns_LE))
    adapter.loss(batch_of()).backward()
    own = {"router", "router_bias", "w_in", "w_out", "bias_in", "bias_out"}
    trained = adapter.trained()
    assert set(trained) == {f"moe.{layer}.{name}" for layer in range(spec.num_layers) for name in own}
    for key, rows in trained.items():
        assert torch.equal(rows, state[key][[1, 7]]), key
    assert all(getattr(layer, name).grad.norm() > 0 for layer in adapter.moe for name in own)
    assert not any(p.requires_grad for layer in adapter.moe for p in layer.shared.parameters())
    adapter.configure(state, SubModel(train_dense=True))
    assert all(p.requires_grad for layer in adapter.moe for p in layer.shared.parameters())
    kinds = {spec.key.split(".")[2]: spec.kind for spec in spec.params if spec.key.startswith("moe.0.")}
    assert kinds == {
        "router": "router",
        "router_bias": "router",
        **dict.fromkeys(("w_in", "w_out", "bias_in", "bias_out"), "expert"),
        "correction_bias": "frozen",
    }
