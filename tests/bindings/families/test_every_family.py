"""Every MoE family of the installed transformers: fedmoe equals eager, and a mask equals the sub-model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, UNCUT, inputs_of, mask_of, tiny_model
from torch import Tensor

from fedmoe_bindings.transformers import extract_submodel, merge_submodel, use_fedmoe
from fedmoe_bindings.transformers.stock.blocks import stock_blocks

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def upstream(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits)


def answer(model: Any, **inputs: Any) -> Tensor:
    """What the model says: logits, or the last hidden states of a bare trunk."""
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = answer(model, **inputs)
    model.zero_grad()
    (logits * upstream(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check_same(found: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], close: float) -> None:
    assert relative(found[0], want[0]) < close
    # Where experts are modules of their own, eager gives none to those that no token reached.
    assert found[1].keys() >= want[1].keys()
    assert not any(found[1][name].any() for name in found[1].keys() - want[1].keys())
    largest = max(float(grad.norm()) for grad in want[1].values())
    for name, grad in want[1].items():
        # Some gradients are nothing but rounding, such as that of a bias that softmax cannot see.
        assert float((found[1][name] - grad).norm()) < close * max(float(grad.norm()), 1e-3 * largest), name


def test_it_equals_eager(family: str) -> None:
    model, inputs = tiny_model(family), inputs_of(family)
    model.set_experts_implementation("eager")
    want = gradients(model, inputs)
    ours = use_fedmoe(copy.deepcopy(model))
    check_same(gradients(ours, inputs), want, 2e-5)
    by_name = copy.deepcopy(model)
    by_name.set_experts_implementation("fedmoe")
    assert relative(answer(by_name, **inputs), want[0]) < 2e-5


def test_a_mask_equals_the_submodel_to_the_bit(family: str, tmp_path: Any) -> None:
    model, inputs = tiny_model(family), inputs_of(family)
    if family in UNCUT:
        with pytest.raises(ValueError, match=UNCUT[family]):
            use_fedmoe(model, permitted=mask_of(model))
        return
    mask = mask_of(model)
    masked = use_fedmoe(copy.deepcopy(model), permitted=mask)
    small = use_fedmoe(extract_submodel(model, mask))
    logits, grads = gradients(masked, inputs)
    cut_logits, cut_grads = gradients(small, inputs)
    assert torch.equal(logits, cut_logits)
    for block, ids in zip(stock_blocks(masked), small.config.fedmoe_kept_experts, strict=True):
        name = f"{block.name}.{block.experts_name}.down_proj"
        if block.outside or name not in cut_grads:  # experts for images, which no token reaches
            continue
        absent = [expert for expert in range(block.num_experts) if expert not in ids]
        assert torch.equal(grads[name][ids], cut_grads[name]), name
        assert not grads[name][absent].any(), name
    small.set_experts_implementation("eager")
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager").eval()
    assert relative(answer(loaded, **inputs), answer(small, **inputs)) < 1e-6
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    others = experts_of(extract_submodel(model, ~mask))
    merge_submodel(model, loaded)
    merged = extract_submodel(model, mask).state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in loaded.state_dict().items())
    for name, value in experts_of(extract_submodel(model, ~mask)).items():
        assert torch.equal(value, others[name]), name


def experts_of(model: Any) -> dict[str, Tensor]:
    """Every tensor of a model's single experts."""
    places = {f"{b.name}.{b.experts_name}": b.experts for b in stock_blocks(model) if b.experts_name}
    found = {f"{place}.{name}": p for place, experts in places.items() for name, p in experts.named_parameters()}
    return {name: value for name, value in found.items() if "norm" not in name}


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_trains_with_checkpointing(family: str, reentrant: bool) -> None:
    stock, inputs = tiny_model(family).train(), inputs_of(family)
    stock.set_experts_implementation("eager")
    ours = use_fedmoe(copy.deepcopy(stock))
    try:
        for model in (stock, ours):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        want = gradients(stock, inputs)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"eager experts cannot: {str(error)[:80]}")
    torch.manual_seed(0)
    check_same(gradients(ours, inputs), want, 1e-4)


def test_it_is_as_near_to_float32_in_bfloat16_as_eager(family: str) -> None:
    inputs = inputs_of(family)
    half = tiny_model(family, dtype=torch.bfloat16)
    half.set_experts_implementation("eager")
    ours = use_fedmoe(copy.deepcopy(half))
    try:
        eager = answer(half, **inputs)
    except RuntimeError as error:
        pytest.skip(f"eager experts cannot: {str(error)[:80]}")
    found, grads = gradients(ours, inputs)
    assert found.dtype == eager.dtype
    # Of a token: one whose choice of experts is a tie in 16 bits may go elsewhere in either.
    error_T = ((found - eager).float().norm(dim=-1) / eager.float().norm(dim=-1)).flatten()
    assert float(error_T.median()) < 0.05
    assert all(grad.isfinite().all() for grad in grads.values())


def test_it_generates_what_eager_generates(family: str) -> None:
    model, inputs = tiny_model(family), inputs_of(family)
    if not getattr(model, "can_generate", lambda: False)():
        pytest.skip("the class built has no language-model head")
    model.set_experts_implementation("eager")
    ours = use_fedmoe(copy.deepcopy(model))
    ask = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for cached in (True, False):
        told = {name: value for name, value in inputs.items() if name != "labels"}
        assert torch.equal(
            ours.generate(**told, **ask, use_cache=cached), model.generate(**told, **ask, use_cache=cached)
        )
