"""Every MoE family as the simulator's live model: equal to the stock model and exported again, or refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_every_family import answer, relative
from tiny_families import FAMILIES, NOT_SIMULATED, inputs_of, tiny_model

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_bindings.transformers.live.families import family_of
from fedmoe_bindings.transformers.live.writing import own_model, require_same
from fedmoe_bindings.transformers.stock.blocks import stock_blocks
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.submodel import SubModel

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


def test_a_sub_model_is_written_as_it_runs(family: str) -> None:
    """Half of the experts, one choice a token, a row of its own, an output factor: all in a stock model's weights."""
    model = tiny_model(family)
    if family in NOT_SIMULATED or model.get_output_embeddings() is None:
        pytest.skip("not a live causal LM")
    adapter = TransformersAdapter(copy.deepcopy(model))
    layers, experts = adapter.spec.num_layers, adapter.spec.num_experts
    held_LE = np.zeros((layers, experts), dtype=bool)
    for number in range(layers):
        held_LE[number, np.arange(number % 2, experts, 2)] = True
    generator = torch.Generator().manual_seed(0)
    state = adapter.state()
    own = torch.randn(state["moe.0.router"].shape[1:], generator=generator)
    submodel = SubModel(
        held_LE,
        held_LE & (np.arange(experts) < experts // 2),
        rows={"moe.0.router": {int(np.flatnonzero(held_LE[0])[0]): own}},
        top_k=1,
        out_scale_L=[1.5] * layers,
    )
    adapter.configure(state, submodel)
    found = own_model(adapter.model, state, adapter._family, adapter.moe, submodel)
    inputs = {name: value.flip(1) for name, value in inputs_of(family).items()}
    batch = Batch(inputs["input_ids"], inputs["attention_mask"].bool())
    require_same(found, adapter.model, batch)
    adapter.configure(state)
    with pytest.raises(ValueError, match="answers otherwise"):
        require_same(found, adapter.model, batch)
