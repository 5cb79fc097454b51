"""use_fedmoe in the hands of its users: wrong readings, masks, wrappers, optimizers, copies, meta devices."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from stock_models import E, batch_of, relative, stock_loss, stock_model
from tiny_families import EXPERTS, class_of, inputs_of, mask_of, tiny_config, tiny_model
from torch import nn

from fedmoe_bindings.transformers import extract_submodel, hold_still, use_fedmoe
from fedmoe_bindings.transformers.stock.blocks import stock_blocks
from fedmoe_bindings.transformers.stock.experts import CHECKED
from fedmoe_bindings.transformers.stock.forms import Form, form_of

HALF = np.arange(E) % 2 == 0


@pytest.mark.parametrize(
    ("family", "activation"),
    [
        ("mixtral", "swiglu"),
        ("gpt_oss", "swiglu_oai"),
        ("openai_privacy_filter", "swiglu_oai"),
        ("aria", "swiglu"),
        ("beam", "swiglu"),
        ("gemma4", "geglu_tanh"),
        ("deepseek_v4", "swiglu_clamped"),
        ("minimax_m3_vl", "swiglu_oai"),
        ("nemotron_h", "relu2"),
    ],
)
def test_the_activation_is_found_by_trying(family: str, activation: str | None) -> None:
    for block in stock_blocks(tiny_model(family)):
        assert form_of(block.experts).activation == activation


@pytest.mark.parametrize(
    ("family", "limit", "activation"),
    [
        ("gpt_oss", 0.02, "swiglu_oai:0.02"),
        ("deepseek_v4", 0.02, "swiglu_clamped:0.02"),
        ("deepseek_v4", 1e8, "swiglu"),  # a limit that nothing reaches
        ("glm5_next", 12.5, "swiglu_clamped:12.5"),
        ("hy_v4", 10.0, "swiglu_clamped"),
        ("hy_v4_vl", 0.02, "swiglu_clamped:0.02"),
    ],
)
def test_experts_that_clamp_run_with_their_own_limit(family: str, limit: float, activation: str) -> None:
    model, inputs = tiny_model(family, dtype=torch.float64), inputs_of(family)
    for block in stock_blocks(model):
        name = "limit" if hasattr(block.experts, "limit") else "swiglu_limit"
        setattr(block.experts, name, limit)
    model.set_experts_implementation("eager")
    want = model(**inputs)[0]
    want.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = use_fedmoe(model)(**inputs)[0]
    found.square().mean().backward()
    assert all(form_of(block.experts).activation == activation for block in stock_blocks(model))
    assert relative(found, want) < 1e-5
    again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert again.keys() == grads.keys()
    largest = max(float(grad.norm()) for grad in grads.values())  # a router's gradient can be rounding alone, 1e-11
    for name, grad in grads.items():
        assert float((again[name] - grad).norm()) < 1e-5 * max(float(grad.norm()), 1e-3 * largest), name


def test_gelu_is_not_taken_for_its_tanh_form() -> None:
    exact, tanh = (stock_model("mixtral", hidden_act=name) for name in ("gelu", "gelu_pytorch_tanh"))
    assert form_of(stock_blocks(exact)[0].experts).activation == "geglu"
    assert form_of(stock_blocks(tanh)[0].experts).activation == "geglu_tanh"
    mish = stock_model("mixtral", hidden_act="mish")
    assert form_of(stock_blocks(mish)[0].experts).activation is None
    for model in (exact, tanh, mish):
        want = stock_loss(model, batch_of())
        assert relative(stock_loss(use_fedmoe(copy.deepcopy(model)), batch_of()), want) < 1e-5


def test_a_module_that_was_misread_says_so_in_its_first_call_however_it_was_chosen() -> None:
    wrong = Form(True, False, False, False, False, "geglu")
    for choose in (use_fedmoe, lambda m: m.set_experts_implementation("fedmoe")):
        model = stock_model("mixtral")
        for block in stock_blocks(model):
            object.__setattr__(block.experts, "_fedmoe_form", wrong)
        choose(model)
        with pytest.raises(RuntimeError, match="MixtralExperts differs from its eager experts"):
            stock_loss(model, batch_of())
    model = use_fedmoe(model, check=False)
    assert stock_loss(model, batch_of()).isfinite(), "the check cannot be switched off"


def test_answers_at_the_end_of_float16_are_no_reason_to_refuse_a_model() -> None:
    """Random weights of std 0.02 leave outputs of 1e-7, where float16 has steps of 6e-8: rounding is 15 % there."""
    for family in ("mixtral", "dbrx"):
        model = tiny_model(family, dtype=torch.float16)
        with torch.no_grad():
            for block in stock_blocks(model):
                for parameter in block.experts.parameters():
                    parameter.mul_(0.01)
        use_fedmoe(model)(**inputs_of(family))
        assert not any(getattr(block.experts, CHECKED, False) for block in stock_blocks(model)), "nothing was told"


def test_a_misread_module_is_found_in_float16_too() -> None:
    model = use_fedmoe(tiny_model("mixtral", dtype=torch.float16))
    for block in stock_blocks(model):
        object.__setattr__(block.experts, "_fedmoe_form", Form(True, False, False, False, False, "geglu"))
    with pytest.raises(RuntimeError, match="MixtralExperts differs from its eager experts"):
        model(**inputs_of("mixtral"))


def test_it_can_be_chosen_when_a_model_is_loaded(tmp_path: Path) -> None:
    model, inputs = tiny_model("qwen3_moe"), inputs_of("qwen3_moe")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="fedmoe").eval()
    assert loaded.get_experts_implementation() == {"": "fedmoe"}
    assert relative(loaded(**inputs).logits, model(**inputs).logits) < 1e-5


def test_the_check_is_made_once() -> None:
    model = use_fedmoe(stock_model("olmoe"))
    assert not any(getattr(block.experts, CHECKED) for block in stock_blocks(model))
    stock_loss(model, batch_of())
    assert all(getattr(block.experts, CHECKED) for block in stock_blocks(model))
    use_fedmoe(model)
    assert all(getattr(block.experts, CHECKED) for block in stock_blocks(model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "ernie4_5_moe"])
def test_auxiliary_loss_and_router_gradients_are_those_of_the_submodel(family: str) -> None:
    model, inputs = tiny_model(family), inputs_of(family)
    mask = mask_of(model)
    masked, small = use_fedmoe(copy.deepcopy(model), permitted=mask), use_fedmoe(extract_submodel(model, mask))
    ask = inputs | {"labels": inputs["input_ids"], "output_router_logits": True}
    found, want = masked(**ask), small(**ask)
    assert torch.equal(found.aux_loss, want.aux_loss)
    assert torch.equal(found.loss, want.loss)
    found.loss.backward()
    for block, mask_E in zip(stock_blocks(masked), mask, strict=True):
        grad = next(p.grad for p in block.router.parameters() if p.shape[0] == EXPERTS)
        assert not grad[~mask_E].any()
        assert grad[mask_E].any()
    lifted, whole = use_fedmoe(masked)(**ask), use_fedmoe(model)(**ask)
    assert torch.equal(lifted.aux_loss, whole.aux_loss)


def test_layers_of_different_numbers_have_router_logits_for_every_expert() -> None:
    model, inputs = tiny_model("mixtral"), inputs_of("mixtral")
    mask = np.array([np.arange(8) < 3, np.arange(8) > 1])
    output = use_fedmoe(model, permitted=mask)(**inputs, output_router_logits=True)
    assert output.aux_loss.isfinite()
    for logits, mask_E in zip(output.router_logits, mask, strict=True):
        assert (logits.isfinite() == torch.from_numpy(mask_E)).all()


def test_weight_decay_and_momentum_do_not_move_what_does_not_run() -> None:
    model, batch = stock_model("mixtral"), batch_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    held = hold_still(optimizer, model)
    stock_loss(use_fedmoe(model), batch).backward()  # every expert gathers momentum
    optimizer.step()
    use_fedmoe(model, permitted=HALF)
    block = stock_blocks(model)[0]
    parts = (block.experts.down_proj, block.experts.gate_up_proj, block.router.weight)
    before = [part.detach().clone() for part in parts]
    for _ in range(3):
        optimizer.zero_grad()
        stock_loss(model, batch).backward()
        optimizer.step()
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part[~HALF], old[~HALF])
        assert not (part[HALF] == old[HALF]).all(dim=-1).any()
    held.remove()
    stock_loss(model, batch).backward()
    optimizer.step()
    assert not torch.equal(parts[0][~HALF], before[0][~HALF]), "it is not the optimizer that moves them"


def test_a_masked_model_is_copied_pickled_and_lifted_alone() -> None:
    model, batch = use_fedmoe(stock_model("qwen3_moe"), permitted=HALF), batch_of()
    want = stock_loss(model, batch)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for again in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(stock_loss(again, batch), want)
        use_fedmoe(again)
        assert not torch.equal(stock_loss(again, batch), want)
    assert torch.equal(stock_loss(model, batch), want), "lifting a copy's mask lifted the original's"


def test_another_implementation_under_the_mask_is_right_too() -> None:
    model, batch = use_fedmoe(stock_model("mixtral"), permitted=HALF), batch_of()
    stock_loss(model, batch).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for name in ("grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(name)
        model.zero_grad()
        stock_loss(model, batch).backward()
        assert all(relative(p.grad, want[key]) < 1e-4 for key, p in model.named_parameters())


def test_models_without_numbers_and_offloaded_ones() -> None:
    tokens = inputs_of("qwen3_moe")["input_ids"]
    cls = class_of("qwen3_moe")
    with torch.device("meta"):
        hollow = use_fedmoe(cls(tiny_config(cls, "qwen3_moe")))
    assert hollow(tokens.to("meta")).logits.shape == (2, 9, 96)
    model = tiny_model("qwen3_moe")
    for permitted in (None, mask_of(model)):
        want = use_fedmoe(copy.deepcopy(model), permitted=permitted)(tokens).logits
        away = copy.deepcopy(model)
        cpu_offload(away, execution_device=torch.device("cpu"))
        assert torch.equal(use_fedmoe(away, permitted=permitted)(tokens).logits, want)
        away = use_fedmoe(copy.deepcopy(model), permitted=permitted)
        cpu_offload(away, execution_device=torch.device("cpu"))
        assert torch.equal(away(tokens).logits, want)


@pytest.mark.parametrize("first", ["fedmoe", "peft"])
@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_either_order_with_adapters_on_experts_reaches_every_layer(first: str, layers: list[int]) -> None:
    model, inputs = tiny_model("qwen3_moe"), inputs_of("qwen3_moe")
    mask = mask_of(model)
    names = [f"{n}.mlp.experts.{p}" for n in layers for p in ("gate_up_proj", "down_proj")]
    lora = LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    found: list[Any] = []
    for order in ("fedmoe", first):
        torch.manual_seed(0)
        ours = copy.deepcopy(model)
        if order == "fedmoe":
            wrapped = get_peft_model(use_fedmoe(ours, permitted=mask), lora)
        else:
            wrapped = use_fedmoe(get_peft_model(ours, lora), permitted=mask)
        found.append(wrapped(**inputs).logits)
    assert torch.equal(*found)
    plain = use_fedmoe(copy.deepcopy(model), permitted=mask)(**inputs).logits
    assert relative(found[0], plain) > 1e-3, "the adapters did nothing"


def test_wrappers_and_strangers_are_named() -> None:
    model = stock_model("mixtral")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    with pytest.raises(ValueError, match="wrapped in Wrapper; call use_fedmoe on the transformers model first"):
        use_fedmoe(Wrapper())
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        use_fedmoe(nn.Linear(2, 2))


def test_masks_that_a_router_cannot_serve_are_refused_and_change_nothing() -> None:
    phi, inputs = tiny_model("phimoe"), inputs_of("phimoe")
    want = use_fedmoe(phi)(**inputs).logits
    with pytest.raises(ValueError, match="cannot route among 1 of 8 experts"):
        use_fedmoe(phi, permitted=np.arange(8) == 3)
    assert torch.equal(phi(**inputs).logits, want)
    with pytest.raises(ValueError, match="layer 0 has no permitted expert"):
        use_fedmoe(phi, permitted=np.zeros(8, dtype=bool))
    with pytest.raises(ValueError, match=r"give a bool mask of shape \(2, 8\)"):
        use_fedmoe(phi, permitted=np.ones(7, dtype=bool))


def test_groups_of_experts_survive_an_even_mask_and_refuse_another() -> None:
    cls = class_of("deepseek_v3")
    config = tiny_config(cls, "deepseek_v3")
    config.n_group, config.topk_group = 4, 2
    torch.manual_seed(0)
    model: Any = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    inputs = inputs_of("deepseek_v3")
    even = np.array([1, 1, 0, 0, 1, 1, 1, 1], dtype=bool)  # three of four groups, whole
    small = extract_submodel(model, even)
    assert (small.config.n_group, small.config.topk_group) == (3, 2)
    masked = use_fedmoe(copy.deepcopy(model), permitted=even)
    assert torch.equal(masked(**inputs).logits, use_fedmoe(small)(**inputs).logits)
    with pytest.raises(ValueError, match=r"4 groups of 2 experts, of which the mask keeps \[2, 1, 0, 0\]"):
        use_fedmoe(model, permitted=np.arange(8) < 3)


def test_quantised_experts_are_refused() -> None:
    model = stock_model("mixtral")
    block = stock_blocks(model)[1]
    block.experts.down_proj.data = block.experts.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"are stored as torch\.float8_e4m3fn"):
        use_fedmoe(model)
