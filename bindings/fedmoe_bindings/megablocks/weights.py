"""Weights of megablocks' dropless layers to and from fedmoe's `LayerState`: modules and state dicts, both ways.

Shapes: E experts, n of them held, H hidden, I intermediate (megablocks' `ffn_hidden_size`). megablocks 0.10.0 stores
`experts.mlp.w1`, `v1` (of "glu" only) and `w2` as (E * I, H), expert after expert, and computes
act(x @ w1[e].T) * (x @ v1[e].T) @ w2[e]. fedmoe stores w_in (n, 2I, H) as [w1; v1], or (n, I, H) without v1, and w_out
(n, H, I), which is w2[e] transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedmoe_core.layer.state import LayerState

ROUTER, BIAS, SHARED = "router.layer.weight", "experts.bias", "shared_expert."
W1, V1, W2 = "experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"
_NO_PLACE = ("bias_in", "bias_out", "router_bias", "correction_bias")


@dataclass(frozen=True)
class DmoeWeights:
    """All weights of one dropless layer.

    Attributes:
        layer: the router and the experts.
        bias_H: (H,), added once to the layer's output whatever the routing weights are, so it is not the experts'
            ``bias_out``; None = the layer has none.
        shared: the shared expert's tensors by their own names, such as "up_proj.weight"; empty = none.
    """

    layer: LayerState
    bias_H: Tensor | None = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)


def state_of(module: nn.Module) -> DmoeWeights:
    """Read the weights of a dropless layer, of megablocks' own or of this package; detached.

    Views where the layout allows one, see `from_state_dict`.

    Args:
        module: has `router.layer.weight`, `experts.mlp.w1` and the others under these names, and `experts.args`.

    Raises:
        ValueError: the module is not such a layer, or holds one rank's part of a layer.
    """
    tensors = {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}
    return from_state_dict(tensors, ffn_hidden_size=_ffn_hidden_size(module))


def from_state_dict(tensors: Mapping[str, Tensor], *, ffn_hidden_size: int, prefix: str = "") -> DmoeWeights:
    """Take a dropless layer's weights out of a state dict.

    `w_out` is a view of w2, and without v1 `w_in` is one of w1. With v1 `w_in` is a copy, for [w1; v1] of one expert
    lie apart in megablocks.

    Args:
        tensors: may hold other modules' tensors too.
        ffn_hidden_size: I. It cannot be told from the shapes: one rank's part of a layer under expert parallelism has
            fewer rows, and would pass for a narrower layer.
        prefix: of the layer's names, such as "blocks.3.ffn.".

    Raises:
        ValueError: a tensor is missing, of another shape, or unknown.
    """
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    shared = {name.removeprefix(SHARED): own.pop(name) for name in list(own) if name.startswith(SHARED)}
    for name in (ROUTER, W1, W2):
        if name not in own:
            raise ValueError(f"{prefix}{name} is missing; give the state dict of a dropless layer, and its prefix")
    if strange := sorted(own.keys() - {ROUTER, W1, V1, W2, BIAS}):
        raise ValueError(
            f"{prefix}{strange[0]} is not a tensor of a dropless layer; leave it out or correct the prefix"
        )
    E, H = own[ROUTER].shape
    for name in (W1, V1, W2):
        if name in own and own[name].shape != (E * ffn_hidden_size, H):
            raise ValueError(
                f"{prefix}{name} has shape {tuple(own[name].shape)}; {E} experts of ffn_hidden_size={ffn_hidden_size} "
                f"need {(E * ffn_hidden_size, H)}, so gather the ranks' parts first, or correct the size"
            )
    w1, w2 = (own[name].view(E, ffn_hidden_size, H) for name in (W1, W2))
    w_in = torch.cat([w1, own[V1].view(E, ffn_hidden_size, H)], dim=1) if V1 in own else w1
    return DmoeWeights(LayerState.whole(own[ROUTER], w_in, w2.transpose(1, 2)), own.get(BIAS), shared)


def to_state_dict(weights: DmoeWeights | LayerState, *, prefix: str = "") -> dict[str, Tensor]:
    """Name and lay out a layer's weights as megablocks does; "glu" where `w_in` has two halves, else "mlp".

    Tensors are views where the layout allows one: never of [gate; up], and of `w_out` only where it is itself a view
    of such a w2.

    Args:
        weights: of all experts.
        prefix: goes before every name.

    Raises:
        ValueError: some experts are not held, or there is a tensor that megablocks has no place for.
    """
    weights = weights if isinstance(weights, DmoeWeights) else DmoeWeights(weights)
    layer = weights.layer
    E = layer.router.shape[0]
    if len(layer.experts) != E:
        raise ValueError(
            f"the state holds {len(layer.experts)} of {E} experts, and a state dict of megablocks needs all; load it "
            "with load_into into a module that has the others"
        )
    rows = {name: matrix.reshape(-1, layer.router.shape[1]) for name, matrix in _matrices(layer).items()}
    found = {ROUTER: layer.router} | rows
    found |= {} if weights.bias_H is None else {BIAS: weights.bias_H}
    found |= {f"{SHARED}{name}": tensor for name, tensor in weights.shared.items()}
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


@torch.no_grad()
def load_into(module: nn.Module, weights: DmoeWeights | LayerState) -> None:
    """Copy weights into a dropless layer, of megablocks' own or of this package; nothing changes if one does not fit.

    Experts that the state does not hold keep their bits, and so do the bias and the shared expert where the state has
    none. The router is always loaded whole, for a state always has all of it.

    Args:
        module: as in `state_of`.
        weights: their dtype and device may be other ones.

    Raises:
        ValueError: a tensor of another shape, or one that the module or megablocks has no place for.
    """
    weights = weights if isinstance(weights, DmoeWeights) else DmoeWeights(weights)
    layer, own, I = weights.layer, dict(module.state_dict(keep_vars=True)), _ffn_hidden_size(module)  # noqa: E741
    E, H = own[ROUTER].shape if ROUTER in own else (0, 0)
    matrices = _matrices(layer)
    for name in (W1, V1, W2):
        if (name in own) != (name in matrices):
            kind, wanted = ("glu", "mlp") if name in own else ("mlp", "glu")
            raise ValueError(f"the module is of mlp_type {kind!r} and the state of {wanted!r}; make the module so")
    given: dict[str, Tensor] = {ROUTER: layer.router} | {f"{SHARED}{name}": t for name, t in weights.shared.items()}
    given |= {} if weights.bias_H is None else {BIAS: weights.bias_H}
    for name, tensor in given.items():
        if name not in own or own[name].shape != tensor.shape:
            has = f"shape {tuple(own[name].shape)}" if name in own else "none"
            raise ValueError(f"{name} is given with shape {tuple(tensor.shape)}, and the module has {has}; make it so")
    for name, matrix in matrices.items():
        if own[name].shape != (E * I, H) or matrix.shape[1:] != (I, H):
            raise ValueError(
                f"{name} is given for experts of {tuple(matrix.shape[1:])}, and the module has {E} of {(I, H)} in "
                f"{tuple(own[name].shape)}; make the module so"
            )
    for name, tensor in given.items():
        own[name].copy_(tensor)
    index = torch.tensor(layer.experts, device=own[W1].device)
    for name, matrix in matrices.items():
        own[name].view(E, I, H)[index] = matrix.to(own[name])


def _matrices(layer: LayerState) -> dict[str, Tensor]:
    """Return w1, v1 where there is one, and w2 as (n, I, H), by their published names."""
    if layer.lora is not None:
        raise ValueError("the state has adapters, which megablocks has no place for; merge them into the experts first")
    if given := [name for name in _NO_PLACE if getattr(layer, name) is not None]:
        raise ValueError(f"the state has {given[0]}, which megablocks has no place for; only a layer without can go")
    I, F = layer.w_out.shape[2], layer.w_in.shape[1]  # noqa: E741
    if F not in (I, 2 * I):
        raise ValueError(f"w_in has {F} rows an expert and w_out {I} columns; give a state of I or 2I rows")
    halves = dict(zip((W1, V1), layer.w_in.split(I, dim=1), strict=False))
    return halves | {W2: layer.w_out.transpose(1, 2)}


def _ffn_hidden_size(module: nn.Module) -> int:
    """I, as the layer was told."""
    size = getattr(getattr(getattr(module, "experts", None), "args", None), "ffn_hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(module).__name__} has no experts.args.ffn_hidden_size; give a dropless layer, a dMoE")
    return size
