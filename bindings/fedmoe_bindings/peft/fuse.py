"""fuse_lora: LoRA that peft put on a model's experts runs as adapters of ``moe_mlp``, never as a whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import layer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from fedmoe_bindings.peft.factors import Factors, expert_lora, joined, paired
from fedmoe_bindings.peft.stacks import interleaved, matrices_of, matrix_shapes
from fedmoe_bindings.transformers import use_fedmoe
from fedmoe_bindings.transformers.stock.experts import NAME
from fedmoe_kernels.backends import warn_once
from fedmoe_kernels.experts.weights import ExpertLora

OFFER = "_fedmoe_lora"  # where the experts function looks for adapters
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fuse_lora(model: PeftModel) -> PeftModel:
    """Run the adapters that peft has on a model's experts inside fedmoe's experts, in place.

    peft adds the product of an adapter's factors to the whole stack of experts, (E, 2I, H), in every forward and keeps
    its gradient in every backward; the fused path multiplies tokens by the factors instead. Loss and gradients are
    those of peft up to rounding. Parameters, their names, saved files and every method of peft stay its own: several
    adapters, ``set_adapter``, ``disable_adapter``, ``merge_and_unload``. ``use_fedmoe`` runs first if it has not.

    Experts that this cannot serve stay on peft's own forward, with one warning that says why.

    Args:
        model: what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned for a LoRA configuration whose
            ``target_parameters`` name experts' ``gate_up_proj``, ``down_proj`` or both, in any of the layers.

    Returns:
        The same model.

    Raises:
        ValueError: no adapters on experts, or ``use_fedmoe`` refuses the model.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        >>> experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        >>> sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
        >>> stock = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
        >>> names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        >>> model = get_peft_model(stock, LoraConfig(r=8, target_modules=[], target_parameters=names))
        >>> tokens = torch.arange(8)[None]
        >>> before = model(tokens).logits
        >>> torch.allclose(fuse_lora(model)(tokens).logits, before, atol=1e-5)
        True
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is not a PeftModel; pass what get_peft_model returned")
    outermost = [
        wrapper
        for _, wrapper, parent in _wrappers(model)
        if not isinstance(parent, layer.ParamWrapper) and matrices_of(wrapper.get_base_layer())
    ]
    if not outermost:
        raise ValueError(
            "the model has no LoRA on experts; name them in LoraConfig(target_parameters=['mlp.experts.gate_up_proj', "
            "'mlp.experts.down_proj'])"
        )
    base = cast(PreTrainedModel, model.get_base_model())
    if getattr(base.config, "_experts_implementation", None) != NAME:
        with _bare_experts(model):
            use_fedmoe(base)
    for wrapper in outermost:
        why = _unfit(wrapper)
        if not why and type(wrapper) is layer.ParamWrapper and "forward" in vars(wrapper):
            why = f"the forward of {type(wrapper.get_base_layer()).__name__}'s wrapper was replaced before fuse_lora"
        if why:
            _say(why)
        else:
            wrapper.__class__ = ParamWrapper
    return model


# peft looks for its wrappers by the name of their class, so this one has the same name.
class ParamWrapper(layer.ParamWrapper):
    """The outermost of peft's wrappers around one layer's experts, when all of them are fused."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Offer the active adapters to the experts function; as peft where there are none, or it cannot serve them."""
        wrappers = list(_chain(self))
        active = not any(w.disable_adapters or w.merged for w in wrappers) and any(_adapters(w) for w in wrappers)
        why = _unfit(self) if active else ""
        if not active or why or kwargs.get("adapter_names") is not None:
            if why:
                _say(why)
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        experts, offer = self.get_base_layer(), Offer(wrappers)
        why = f"the experts function of {type(experts).__name__} does not take adapters"
        setattr(experts, OFFER, offer)
        try:
            result = experts(x, *args, **kwargs)
            if offer.taken:
                return result
        except ValueError as refusal:
            if offer.taken:
                raise
            why = str(refusal)  # or what was wrong is wrong again below
        finally:
            setattr(experts, OFFER, None)
        _say(why)
        return super().forward(x, *args, **kwargs)


class Offer:
    """The active adapters of one layer's experts, made when the experts function asks.

    Attributes:
        taken: whether it has asked.
    """

    def __init__(self, wrappers: list[layer.ParamWrapper]) -> None:
        self.wrappers, self.taken = wrappers, False

    def __call__(self) -> ExpertLora:
        """Return the sum of all active adapters; slot e holds expert e, and gradients reach peft's parameters."""
        self.taken = True
        experts = self.wrappers[0].get_base_layer()
        name_in, name_out = matrices_of(experts)
        found = {w.parameter_name: _factors(w) for w in self.wrappers if _adapters(w)}
        return expert_lora(*paired(found.get(name_in), found.get(name_out), *matrix_shapes(experts)))


def _factors(wrapper: layer.ParamWrapper) -> Factors:
    adapters = [
        Factors.from_peft(
            cast(Tensor, wrapper.lora_A[adapter].weight),
            cast(Tensor, wrapper.lora_B[adapter].weight),
            wrapper.num_experts,
            scale=wrapper.scaling[adapter],
            interleaved=interleaved(wrapper.get_base_layer(), wrapper.parameter_name),
        )
        for adapter in _adapters(wrapper)
    ]
    return joined([factors.to(wrapper.get_param()) for factors in adapters])


def _unfit(outermost: layer.ParamWrapper) -> str:
    """Say why these experts must run on peft's own forward; "" = they need not."""
    experts = outermost.get_base_layer()
    kind, known = type(experts).__name__, matrices_of(experts)
    strange = [w.parameter_name for w in _chain(outermost) if w.parameter_name not in known]
    if strange:
        return f"{kind} has adapters on {strange[0]}, which is neither of its matrices"
    if getattr(getattr(experts, "config", None), "_experts_implementation", None) != NAME:
        return f"{kind} runs another experts implementation; choose {NAME!r}, by use_fedmoe"
    if is_parametrized(experts):
        return f"{kind} is parametrized by more than these adapters"
    if outermost.num_experts == 1:
        return f"{kind} has one expert, which peft treats as a plain matrix"
    for name, parameter in experts.named_parameters(recurse=False):
        if parameter.requires_grad:
            return f"{kind}.{name} trains beside its adapters; the fused path freezes what it adapts"
    if (dtype := outermost.get_param().dtype) not in _DTYPES:
        return f"{kind} is stored in {dtype}"
    return ""


def _say(why: str) -> None:
    warn_once(f"LoRA of experts runs on peft's own forward: {why}")


def _adapters(wrapper: layer.ParamWrapper) -> list[str]:
    return [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]


def _chain(wrapper: nn.Module) -> Iterator[layer.ParamWrapper]:
    """Yield the nested wrappers of one module, outermost first."""
    while isinstance(wrapper, layer.ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def _wrappers(model: nn.Module) -> list[tuple[str, layer.ParamWrapper, nn.Module]]:
    """List every wrapper of a parameter with its name in its parent, and the parent."""
    return [
        (name, child, parent)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, layer.ParamWrapper)
    ]


@contextmanager
def _bare_experts(model: nn.Module) -> Iterator[None]:
    """Within the block let the model's experts stand without their wrappers, which hide what they are."""
    hidden = [(n, w, p) for n, w, p in _wrappers(model) if not isinstance(p, layer.ParamWrapper)]
    try:
        for name, wrapper, parent in hidden:
            setattr(parent, name, wrapper.get_base_layer())
        yield
    finally:
        for name, wrapper, parent in hidden:
            setattr(parent, name, wrapper)
