"""LoRA of experts on the fused path against peft's forward: loss, every gradient by name, and peft's methods."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from drawn_adapters import randomised
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layer
from stock_models import FAMILIES, batch_of, relative, stock_loss, stock_model
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedmoe_bindings.peft import fuse
from fedmoe_bindings.peft.fuse import fuse_lora
from fedmoe_bindings.transformers import extract_submodel, use_fedmoe
from fedmoe_bindings.transformers.stock.experts import fedmoe_experts
from fedmoe_kernels.backends import warn_once

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FIRST_LAYER = ["layers.0.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def said_again():
    """A warning that is said once is said in every test, and an unexpected one is an error."""
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA of experts")
        yield


def adapted(family: str = "qwen3_moe", *, targets: list[str] = BOTH, **settings: object) -> PeftModel:
    config = LoraConfig(**{"r": 3, "lora_alpha": 4, "target_modules": [], "target_parameters": targets, **settings})
    return randomised(get_peft_model(stock_model(family), config))


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = stock_loss(model, batch_of())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def equal(ours: nn.Module, peft: nn.Module, *, tolerance: float = 1e-5) -> None:
    """The same loss, and the same gradient of every adapter by name; none is missing, none all zero."""
    loss, got = gradients(ours)
    want_loss, want = gradients(peft)
    assert relative(loss, want_loss) < tolerance
    assert list(got) == list(want)
    for name, grad in want.items():
        assert grad.any(), name
        assert relative(got[name], grad) < tolerance, name


def fused_calls(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many layers of a forward run on the fused path, and that none of them builds a whole matrix."""
    calls = []
    taken = fuse.Offer.__call__
    with monkeypatch.context() as patch:
        patch.setattr(fuse.Offer, "__call__", lambda self: (calls.append(1), taken(self))[1])
        patch.setattr(peft_layer.ParamWrapper, "get_delta_factors", None)
        patch.setattr(peft_layer.ParamWrapper, "get_delta_weight", None)
        stock_loss(model, batch_of())
    return len(calls)


@pytest.mark.parametrize("order", ["use_fedmoe first", "use_fedmoe by fuse_lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_pefts_in_either_order(family, order, monkeypatch):
    peft = adapted(family)
    if order == "use_fedmoe first":
        config = peft.peft_config["default"]
        ours = randomised(get_peft_model(use_fedmoe(stock_model(family)), copy.deepcopy(config)))
    else:
        ours = copy.deepcopy(peft)
    assert fuse_lora(ours) is ours
    equal(ours, peft)
    assert fused_calls(ours, monkeypatch) == (2 if family == "qwen3_moe" else 3)
    assert list(ours.state_dict()) == list(peft.state_dict())


@pytest.mark.parametrize(
    ("targets", "settings", "layers"),
    [
        (BOTH[:1], {}, 2),
        (BOTH[1:], {}, 2),
        (FIRST_LAYER, {}, 2),  # another matrix in every layer
        (FIRST_LAYER[:1], {}, 1),
        (BOTH, {"use_rslora": True}, 2),
        (BOTH, {"rank_pattern": {".*down_proj": 2}, "alpha_pattern": {".*layers.0.*": 9}}, 2),
        (BOTH, {"target_modules": ["q_proj", "v_proj"]}, 2),
        ([*BOTH, "mlp.gate.weight"], {}, 2),
    ],
    ids=["gate_up", "down", "one each", "one layer", "rslora", "patterns", "attention too", "router too"],
)
def test_whatever_is_wrapped(targets, settings, layers, monkeypatch):
    peft = adapted(targets=targets, **settings)
    ours = fuse_lora(copy.deepcopy(peft))
    equal(ours, peft)
    if "mlp.gate.weight" not in targets:
        assert fused_calls(ours, monkeypatch) == layers
    fuse_lora(ours)  # a second call changes nothing
    equal(ours, peft)


def test_the_adapters_are_really_used_and_the_base_gets_no_gradient():
    ours = fuse_lora(adapted())
    loss, _ = gradients(ours)
    with ours.disable_adapter():
        bare = stock_loss(ours, batch_of())
    assert relative(bare, stock_loss(stock_model("qwen3_moe"), batch_of())) < 1e-5
    assert abs(loss - bare) > 1e-3
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


def test_several_adapters_switched_joined_merged_and_unmerged(monkeypatch):
    peft = adapted()
    other = LoraConfig(r=5, lora_alpha=2, target_modules=[], target_parameters=BOTH)
    ours = fuse_lora(copy.deepcopy(peft))
    for model in (peft, ours):
        model.add_adapter("other", copy.deepcopy(other))
        randomised(model, seed=1)
    equal(ours, peft)
    for model in (peft, ours):
        model.set_adapter("other")
    equal(ours, peft)
    for model in (peft, ours):
        model.base_model.set_adapter(["default", "other"])
    equal(ours, peft)
    assert fused_calls(ours, monkeypatch) == 2
    want = stock_loss(ours, batch_of())
    ours.merge_adapter()
    assert relative(stock_loss(ours, batch_of()), want) < 1e-5
    ours.unmerge_adapter()
    equal(ours, peft, tolerance=1e-4)  # merging and unmerging rounds the base
    plain = ours.merge_and_unload()
    assert not any("lora" in name for name in plain.state_dict())
    assert not any(isinstance(module, peft_layer.ParamWrapper) for module in plain.modules())
    assert relative(stock_loss(plain, batch_of()), want) < 1e-5


def test_saved_by_peft_and_loaded_on_a_stock_model(tmp_path):
    ours = fuse_lora(adapted())
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(stock_model("qwen3_moe"), tmp_path, is_trainable=True)
    equal(ours, plain)
    equal(fuse_lora(PeftModel.from_pretrained(stock_model("qwen3_moe"), tmp_path, is_trainable=True)), plain)


def test_a_mask_stays_in_either_order():
    held = np.arange(6) % 2 == 0
    peft = adapted()
    both = np.tile(held, (2, 1))
    stock = extract_submodel(stock_model("qwen3_moe"), both)
    assert stock.config.num_experts == 3
    ours = fuse_lora(randomised(get_peft_model(use_fedmoe(stock_model("qwen3_moe"), permitted=held), _config())))
    unfused = randomised(get_peft_model(use_fedmoe(stock_model("qwen3_moe"), permitted=held), _config()))
    equal_where_reached(ours, unfused)
    with ours.disable_adapter():
        assert relative(stock_loss(ours, batch_of()), stock_loss(stock, batch_of())) < 1e-5
    assert relative(stock_loss(ours, batch_of()), stock_loss(peft, batch_of())) > 1e-3


def _config() -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=4, target_modules=[], target_parameters=BOTH)


def equal_where_reached(ours: nn.Module, truth: nn.Module) -> None:
    (loss, got), (want_loss, want) = gradients(ours), gradients(truth)
    assert relative(loss, want_loss) < 1e-5
    for name, grad in want.items():
        assert relative(got[name], grad) < 1e-5, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant):
    peft = adapted()
    ours = fuse_lora(copy.deepcopy(peft))
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    ours.train()
    equal(ours, peft)


def test_in_bfloat16_with_adapters_in_float32():
    def noise(model):
        truth = adapted().double()
        truth.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
        (_, want), (_, got) = gradients(truth), gradients(model)
        return {name: relative(got[name].double(), want[name]) for name in want}

    base = stock_model("qwen3_moe").to(torch.bfloat16)
    peft = randomised(get_peft_model(base, _config()))
    assert {p.dtype for p in peft.parameters()} == {torch.bfloat16, torch.float32}
    own, fused = noise(peft), noise(fuse_lora(copy.deepcopy(peft)))
    assert np.median(list(fused.values())) < 1.5 * np.median(list(own.values()))  # as near float64 as peft itself


def saved_bytes(model: nn.Module) -> int:
    """What autograd keeps of one forward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stock_loss(model, batch_of())
    del loss
    return sum(kept.values())


def test_no_matrix_of_all_experts_is_kept_for_the_backward():
    peft = adapted(r=1)
    ours = fuse_lora(copy.deepcopy(peft))
    experts = ours.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    whole = 2 * (experts.gate_up_proj.nbytes + experts.down_proj.nbytes)  # two layers have experts
    use_fedmoe_only = copy.deepcopy(peft)  # the same experts function, with peft's own forward
    with fuse._bare_experts(use_fedmoe_only):
        use_fedmoe(use_fedmoe_only.get_base_model())
    assert saved_bytes(use_fedmoe_only) - saved_bytes(ours) > 0.9 * whole


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda m: m.get_base_model().set_experts_implementation("eager"), "runs another experts implementation"),
        (
            lambda m: m.get_base_model().model.layers[0].mlp.experts.get_base_layer().down_proj.requires_grad_(),
            "down_proj trains beside its adapters",
        ),
    ],
    ids=["eager", "base trains"],
)
def test_what_it_cannot_serve_is_left_to_peft_with_one_warning(break_it, why):
    peft = adapted()
    ours = fuse_lora(copy.deepcopy(peft))
    for model in (peft, ours):
        break_it(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            equal(ours, peft)
    (one,) = [str(one.message) for one in said if "LoRA of experts" in str(one.message)]
    assert "runs on peft's own forward" in one
    assert why in one


def test_experts_with_another_parametrization_stay_with_peft():
    peft = adapted()
    ours = fuse_lora(copy.deepcopy(peft))
    for model in (peft, ours):
        experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
        nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    with pytest.warns(RuntimeWarning, match="is parametrized by more than these adapters"):
        equal(ours, peft)  # once: peft itself leaves its proxy behind on such a model


def test_transposed_and_interleaved_experts_are_offered_in_our_order():
    """gpt-oss: (E, H, 2I) with rows of gate and up in turn; the experts function wants [gate; up]."""
    sizes = dict(hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_local_experts=6, vocab_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    model = randomised(get_peft_model(GptOssForCausalLM(GptOssConfig(**sizes, **heads)), _config())).double()
    wrappers = [module for module in model.modules() if isinstance(module, peft_layer.ParamWrapper)]
    lora, truth = fuse.Offer(wrappers)(), {w.parameter_name: w.get_delta_weight("default").mT for w in wrappers}
    rows = truth["gate_up_proj"]
    assert relative(lora.scale * lora.b_in @ lora.a_in, torch.cat([rows[:, ::2], rows[:, 1::2]], 1)) < 1e-12
    assert relative(lora.scale * lora.b_out @ lora.a_out, truth["down_proj"]) < 1e-12


@pytest.mark.parametrize("manner", ["passes over them", "refuses them"])
def test_an_experts_function_without_adapters_is_noticed(manner, monkeypatch):
    """An experts function that cannot serve a module's adapters must not lose them silently."""

    def deaf(self, *arguments):
        offered, self._fedmoe_lora = self._fedmoe_lora, None
        if offered is not None and manner == "refuses them":
            raise ValueError("these experts have an activation of their own")
        try:
            return fedmoe_experts(self, *arguments)
        finally:
            self._fedmoe_lora = offered

    peft = adapted()
    ours = fuse_lora(copy.deepcopy(peft))
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "fedmoe", deaf)
    why = "does not take adapters" if manner == "passes over them" else "an activation of their own"
    with pytest.warns(RuntimeWarning, match=f"runs on peft's own forward: .*{why}"):
        equal(ours, peft)


def test_an_error_of_the_experts_themselves_is_raised(monkeypatch):
    ours = fuse_lora(adapted())
    ours.get_base_model().model.layers[0].mlp.experts.get_base_layer().down_proj.data = torch.zeros(6, 16, 11)
    with pytest.raises(ValueError, match=r"another model|w_out"):
        stock_loss(ours, batch_of())


def test_one_expert_stays_with_peft():
    def single() -> PeftModel:
        return randomised(get_peft_model(stock_model("mixtral", num_local_experts=1, num_experts_per_tok=1), _config()))

    with pytest.warns(RuntimeWarning, match="has one expert"):
        equal(fuse_lora(single()), single(), tolerance=1e-4)


def test_models_without_such_adapters_are_refused():
    with pytest.raises(ValueError, match="MixtralForCausalLM is not a PeftModel"):
        fuse_lora(stock_model("mixtral"))
    attention = get_peft_model(stock_model("mixtral"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"no LoRA on experts; name them in LoraConfig\(target_parameters"):
        fuse_lora(attention)


def test_compiled(fresh_compiler):
    peft = adapted()
    ours = fuse_lora(copy.deepcopy(peft))
    loss, want = gradients(peft)
    compiled = torch.compile(ours, backend="aot_eager")
    ours.zero_grad()
    got = stock_loss(compiled, batch_of())
    got.backward()
    assert relative(got, loss) < 1e-5
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter.grad, want[name]) < 1e-5, name
