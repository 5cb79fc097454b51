"""A dropless layer as fedmoe's own `MoE`, which stores only permitted experts and fuses the activation, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmoe_bindings.megablocks.weights import DmoeWeights, state_of
from fedmoe_core import MoE
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.storage import ExpertMask

_FUNCTIONS: tuple[tuple[Callable[..., Tensor], str], ...] = (
    *((functional.silu, "silu"), (functional.relu, "relu"), (torch.relu, "relu"), (functional.gelu, "gelu")),
)
_GATED: Mapping[str, str] = MappingProxyType({"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"})


class Beside(nn.Module):
    """What megablocks adds to the experts' output: the layer's bias, the shared expert, or both.

    Attributes:
        bias: (H,), or None.
        expert: a module (T, H) -> (T, H), or None.
    """

    bias: nn.Parameter | None
    expert: nn.Module | None

    def __init__(self, bias_H: Tensor | None, expert: nn.Module | None) -> None:
        super().__init__()
        self.register_parameter("bias", None if bias_H is None else nn.Parameter(bias_H.detach().clone()))
        self.expert = copy.deepcopy(expert)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Return (T, H), or (H,) where there is nothing but a bias."""
        if self.expert is None:
            assert self.bias is not None
            return self.bias
        y_TH: Tensor = self.expert(x_TH)
        return y_TH if self.bias is None else y_TH + self.bias


def moe_of(
    module: nn.Module, *, permitted: ExpertMask | None = None, trainable: ExpertMask | None = None, **options: Any
) -> MoE:
    """Make fedmoe's own layer with copies of a dropless layer's weights, of megablocks' own or of this package.

    The output is the whole one, with the bias. What a dMoE keeps for the router's losses is not kept here; fedmoe's own
    are in `fedmoe_core.layer.router_loss`.

    Args:
        module: a dMoE.
        permitted, trainable, options: as `MoE`.

    Raises:
        ValueError: a setting or an activation function that `MoE` does not have, by name.

    Example:
        >>> from fedmoe_bindings.megablocks import Arguments, dMoE
        >>> args = Arguments(16, 32, moe_num_experts=4, moe_top_k=2, mlp_type="glu", fp16=False)
        >>> moe_of(dMoE(args), permitted=[True, True, False, False])
        MoE(
          hidden_size=16, intermediate_size=32, top_k=2, experts=2/4, trainable=2
          (shared): Beside()
        )
    """
    weights = state_of(module)
    own: Any = module
    args = own.experts.args
    p = args.moe_normalize_expert_weights or 0
    reasons = {
        "moe_jitter_eps": (args.moe_jitter_eps is not None, "it routes without noise"),
        "moe_normalize_expert_weights": (p not in (0, 1), "it divides by the sum, p = 1, or not at all"),
        "uniform_expert_assignment": (args.uniform_expert_assignment, "it routes by the router"),
        "shared_expert_weighted_sum": (args.shared_expert and args.shared_expert_weighted_sum, "it adds both outputs"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise ValueError(f"{name}={getattr(args, name)!r} is not a setting of MoE: {reason}; keep the dMoE")
    shared = own.shared_expert
    beside = None if weights.bias_H is None and shared is None else Beside(weights.bias_H, shared)
    return MoE.of(
        weights.layer,
        args.moe_top_k,
        permitted=permitted,
        trainable=trainable,
        activation=activation_name(args.activation_fn, args.mlp_type),
        rule=RoutingRule("softmax", renormalize=p == 1),
        shared=beside,
        **options,
    )


def weights_of(layer: MoE) -> DmoeWeights:
    """Return a layer's weights for `load_into`: the experts that it holds, and what `moe_of` put beside them."""
    beside = layer.shared
    if not isinstance(beside, Beside):
        return DmoeWeights(layer.global_state())
    expert = {} if beside.expert is None else {name: t.detach() for name, t in beside.expert.state_dict().items()}
    return DmoeWeights(layer.global_state(), None if beside.bias is None else beside.bias.detach(), expert)


def activation_name(function: Any, mlp_type: str) -> str:
    """Return what `moe_mlp` calls an activation function.

    Args:
        function: of torch.nn.functional or a module of torch.nn; gelu also with approximate="tanh".
        mlp_type: "glu" or "mlp".

    Raises:
        ValueError: another function, or one that has no gated form; the sentence lists those that are known.
    """
    name = next((known for same, known in _FUNCTIONS if function is same), None)
    name = {nn.SiLU: "silu", nn.ReLU: "relu", nn.GELU: "gelu"}.get(type(function), name)
    approximate = "none"
    if isinstance(function, nn.GELU):
        approximate = function.approximate
    elif isinstance(function, partial) and function.func is functional.gelu and not function.args:
        name, approximate = "gelu", dict({"approximate": "none"}, **function.keywords)["approximate"]
    name = "gelu_tanh" if name == "gelu" and approximate == "tanh" else name
    known: Mapping[str, str] = _GATED if mlp_type == "glu" else {n: n for n in ("relu", *_GATED)}
    if name is None or name not in known:
        raise ValueError(
            f"activation_fn={function!r} of mlp_type {mlp_type!r} has no kernel; those of {', '.join(known)} have, as "
            "functions of torch.nn.functional, so keep the dMoE, which takes any function"
        )
    return known[name]
