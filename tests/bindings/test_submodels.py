"""Sub-models that stay the model they were cut from: dtypes, settings, flags, files, and what comes back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stock_models import E, batch_of, stock_loss, stock_model
from tiny_families import inputs_of, mask_of, tiny_model

from fedmoe_bindings.transformers import TransformersAdapter, extract_submodel, load_adapter, merge_submodel, use_fedmoe
from fedmoe_bindings.transformers.stock.blocks import stock_blocks

HALF = np.arange(E) % 2 == 0


def mixed(family: str = "qwen3_moe") -> Any:
    """A bfloat16 model with a float32 router and rotary table, as checkpoints are loaded."""
    model = tiny_model(family, dtype=torch.bfloat16)
    for block in stock_blocks(model):
        for parameter in block.router.parameters():
            parameter.data = parameter.data.float() + 1e-4 * torch.randn(parameter.shape)
    return model


def test_every_tensor_keeps_its_dtype_and_only_what_changed_comes_back() -> None:
    model = mixed()
    before = copy.deepcopy(model)
    small = extract_submodel(model, mask_of(model))
    kinds = {name: value.dtype for name, value in [*model.named_parameters(), *model.named_buffers()]}
    assert {name: v.dtype for name, v in [*small.named_parameters(), *small.named_buffers()]} == kinds
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    small = small.to(torch.bfloat16)  # rounds the router and the rotary table of the sub-model
    with torch.no_grad():
        stock_blocks(small)[0].experts.down_proj[1] += 1
    merge_submodel(model, small)
    moved = stock_blocks(model)[0]
    for (name, now), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if now is not moved.experts.down_proj:
            assert torch.equal(now, old), name
    changed = (moved.experts.down_proj != stock_blocks(before)[0].experts.down_proj).flatten(1).any(dim=1)
    kept = small.config.fedmoe_kept_experts[0]
    assert changed.nonzero().flatten().tolist() == [kept[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_masked_model_to_the_bit_in_its_dtype(dtype: torch.dtype) -> None:
    model, inputs = tiny_model("qwen3_moe", dtype=dtype), inputs_of("qwen3_moe")
    mask = mask_of(model)
    small = use_fedmoe(extract_submodel(model, mask))
    assert torch.equal(small(**inputs).logits, use_fedmoe(model, permitted=mask)(**inputs).logits)


def test_the_rotary_table_is_not_rounded_by_loading_exporting_or_cutting(tmp_path: Any) -> None:
    stock_model("qwen3_moe").save_pretrained(tmp_path)
    adapter = load_adapter(str(tmp_path), dtype=torch.bfloat16)
    tiny = load_adapter("tiny", dtype=torch.bfloat16)
    for model in (adapter.model, adapter.export(), tiny.model, extract_submodel(adapter.export(), HALF)):
        tables = [value for name, value in model.named_buffers() if name.endswith("inv_freq")]
        assert tables
        assert all(table.dtype == torch.float32 for table in tables)
        assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if "down_proj" in name)


def test_generation_stops_where_the_whole_model_stops(tmp_path: Any) -> None:
    model = tiny_model("qwen3_moe")
    ask = {"input_ids": inputs_of("qwen3_moe")["input_ids"][:1], "max_new_tokens": 12, "pad_token_id": 0}
    everyone = np.ones(8, dtype=bool)
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.eos_token_id = [int(model.generate(**ask, eos_token_id=None)[0, 12])]
    written = model.generate(**ask)
    assert written.shape[1] < 21
    small = extract_submodel(model, everyone)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for again in (small, loaded, TransformersAdapter(copy.deepcopy(model)).export()):
        assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
        assert again.generation_config.repetition_penalty == 1.3
        assert torch.equal(again.generate(**ask), written)


def test_flags_modes_and_ties_survive() -> None:
    model = stock_model("qwen3_moe")  # with tied embeddings
    model.train().gradient_checkpointing_enable()
    model.model.layers[0].eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    small = extract_submodel(model, HALF)
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert {n: m.training for n, m in small.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert [layer.gradient_checkpointing for layer in small.model.layers] == [True] * 3
    stock_loss(small, batch_of()).backward()
    assert {n for n, p in small.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    state = torch.random.get_rng_state()
    extract_submodel(model, HALF)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
@pytest.mark.parametrize("original", [True, False])
def test_both_file_layouts_load_and_merge_back(family: str, original: bool, tmp_path: Any) -> None:
    model, inputs = tiny_model(family), inputs_of(family)
    small = extract_submodel(model, mask_of(model))
    small.save_pretrained(tmp_path, save_original_format=original)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)
    before = copy.deepcopy(model)
    merge_submodel(model, loaded)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_submodel_is_not_taken_for_a_whole_model(tmp_path: Any) -> None:
    model = stock_model("mixtral")
    small = extract_submodel(model, HALF)
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a sub-model, cut from one of 6 experts; merge it into that model"):
        load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="was cut from 6 experts, the full model has 3"):
        merge_submodel(small, small)
    other = stock_model("mixtral", hidden_size=32)
    with pytest.raises(ValueError, match=r"they are not one model|fedmoe cannot tell"):
        merge_submodel(other, small)
    with pytest.raises(ValueError, match="it was not cut from this model"):
        merge_submodel(stock_model("olmoe"), small)
