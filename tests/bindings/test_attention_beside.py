"""Whose attention is measured beside a MoE layer, and which of an attention module's answers are its maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stock_models import relative
from tiny_families import class_of, inputs_of, tiny_config, tiny_model

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core.data.batches import Batch


def right_padded(family: str) -> Batch:
    inputs = {name: value.flip(1) for name, value in inputs_of(family).items()}
    return Batch(inputs["input_ids"], inputs["attention_mask"].bool())


@pytest.mark.parametrize("family", ["mixtral", "glm_moe_dsa"])  # the latter returns the chosen tokens after its maps
def test_it_is_what_transformers_reports(family: str) -> None:
    model, batch = tiny_model(family), right_padded(family)
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    mask_SN = batch.mask_SN
    maps = stock(input_ids=batch.tokens_SN, attention_mask=mask_SN.long(), output_attentions=True).attentions
    seers_SN = mask_SN.flip(1).cumsum(1).flip(1).clamp(min=1)
    got = [(each.mean(dim=1) * mask_SN[:, :, None]).sum(dim=1) / seers_SN * mask_SN for each in maps]
    adapter = TransformersAdapter(model)
    assert relative(adapter.attention_received(batch), torch.stack(got)) < 1e-5
    with adapter.watch_attention() as received:
        adapter.evaluate(batch)
        means = [each.mean(dim=1).sum(dim=1) / (each > 0).any(dim=1).sum(dim=1).clamp(min=1) for each in maps]
        for found, want in zip(received, means, strict=True):
            assert relative(found[0], want[0]) < 1e-5  # without padding, which fedmoe's layers do not route


def hybrid() -> Any:
    """Jamba of a Mamba block and one of attention, each with experts."""
    config = tiny_config(class_of("jamba"), "jamba")
    config.attn_layer_period, config.attn_layer_offset, config.use_mamba_kernels = 2, 1, False
    return class_of("jamba")(config).eval()


@pytest.mark.parametrize(
    ("make", "layer", "words"),
    [
        (hybrid, 0, "MoE layer 0 has no attention beside it that could be measured"),
        (lambda: tiny_model("minimax"), 1, "the attention beside MoE layer 1 has no maps that could be measured"),
    ],
    ids=["state space", "linear attention"],
)
def test_a_block_without_maps_does_not_get_those_of_another(make: Any, layer: int, words: str) -> None:
    adapter, batch = TransformersAdapter(make()), right_padded("jamba")
    with adapter.watch_attention() as received:
        adapter.evaluate(batch)
    assert received[layer] is None
    assert received[1 - layer].shape == batch.tokens_SN.shape
    with pytest.raises(ValueError, match=words):
        adapter.attention_received(batch)
