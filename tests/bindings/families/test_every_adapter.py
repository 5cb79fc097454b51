"""Every MoE family as the simulator's live model: equal to the stock model and exported again, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from test_every_family import answer, relative
from tiny_families import FAMILIES, NOT_SIMULATED, inputs_of, tiny_model

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_bindings.transformers.live.families import family_of
from fedmoe_bindings.transformers.stock.blocks import stock_blocks
from fedmoe_core.data.batches import Batch

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def test_the_adapter_is_the_stock_model(family: str) -> None:
    model = tiny_model(family)
    if family in NOT_SIMULATED:
        with pytest.raises(ValueError, match=NOT_SIMULATED[family]):
            TransformersAdapter(model)
        return
    if model.get_output_embeddings() is None:
        assert family_of(stock_blocks(model)[0]).rule
        return
    # The simulator pads on the right.
    inputs = {name: value.flip(1) for name, value in inputs_of(family).items()}
    real = inputs["attention_mask"].bool()
    model.set_experts_implementation("eager")
    want = answer(model, **inputs)[real]
    adapter = TransformersAdapter(copy.deepcopy(model))
    assert relative(answer(adapter.model, **inputs)[real], want) < 2e-5
    again = adapter.export()
    again.set_experts_implementation("eager")
    assert torch.equal(answer(again, **inputs)[real], want)
    for checkpointed in (False, True):
        if checkpointed:
            if not model.supports_gradient_checkpointing:
                continue
            adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = adapter.loss(Batch(inputs["input_ids"], real))
        loss.backward()
        for layer in adapter.moe:
            assert int(layer.last_stats.hits_E.sum()) == adapter.spec.top_k * int(real.sum()), "padding was routed"
