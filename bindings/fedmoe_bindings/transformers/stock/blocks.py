"""Where the MoE blocks of a stock transformers model are, found by what its modules are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fedmoe_bindings.transformers.stock.outside import OUTSIDE, REFUSED, Outside

# Left on every experts module by transformers' own decorator, which makes it ask for an experts function.
_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_ROUTERS = ("gate", "router")
_BLOCKS = ("Experts", "Expert", "MoE", "Moe", "MoeBlock", "SparseMLP")  # how families call modules that have experts
# In the config.json of a sub-model: the expert ids of each MoE layer, in the coordinates of the model it was cut from,
# and how many experts that has.
KEPT, CUT_FROM = "fedmoe_kept_experts", "fedmoe_cut_from"
Mask = np.ndarray | Tensor | Sequence[np.ndarray]


@dataclass(frozen=True)
class StockBlock:
    """One MoE block of a stock model.

    Attributes:
        name: of the module that holds router and experts; "" for the model itself.
        module: that module.
        experts_name: of the experts within the block, without what peft or others wrapped around them.
        router_name: of the router within the block.
        experts, router: the modules themselves.
        num_experts: E.
        outside: what replaces the forward of the experts, or of the whole block, in a family outside the interface.
    """

    name: str
    module: nn.Module
    experts_name: str
    router_name: str
    experts: nn.Module
    router: nn.Module
    num_experts: int
    outside: type[Outside] | None = None


def is_experts(module: nn.Module) -> bool:
    """Say whether transformers runs this module by an experts function."""
    return all(hasattr(module, mark) for mark in _MARKS) and hasattr(type(module), "_apply_gate")


def stock_blocks(model: nn.Module) -> tuple[StockBlock, ...]:
    """List the MoE blocks that fedmoe can reach, in the order of the model's modules.

    Raises:
        ValueError: there is none; the sentence says what was looked for.
    """
    blocks = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        kind = type(module).__name__
        if kind in REFUSED:
            raise ValueError(f"{name} ({kind}) is refused: {REFUSED[kind]}")
        outside = OUTSIDE.get(kind)
        if not is_experts(module) and outside is None:
            continue
        if outside is not None and isinstance(getattr(module, "router", None), nn.Module):  # it is the whole block
            router = cast(nn.Module, module.router)
            blocks.append(StockBlock(name, module, "", "router", module, router, outside(module).count, outside))
            continue
        place = name
        while place.endswith(".base_layer"):  # peft's wrappers stand between a block and its experts
            place = place.removesuffix(".base_layer")
        above, _, child = place.rpartition(".")
        router_name = next((r for r in _ROUTERS if isinstance(getattr(modules[above], r, None), nn.Module)), None)
        if router_name is None:
            raise ValueError(
                f"{above or 'the model'} has experts but no router called {' or '.join(_ROUTERS)}; "
                "fedmoe cannot tell how its tokens are routed"
            )
        count = cast(Tensor, module.down_proj).shape[0] if outside is None else outside(module).count
        inside = _unwrapped(getattr(modules[above], router_name))
        blocks.append(StockBlock(above, modules[above], child, router_name, module, inside, count, outside))
    if not blocks:
        raise ValueError(what_is_missing(model))
    return tuple(blocks)


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse what the configuration of a model already shows that it cannot be served.

    Raises:
        ValueError: it has no number of experts, or was cut out of a larger model.
    """
    if not _counts(config):
        raise ValueError(
            f"model {name!r} ({config.model_type}) is not a Mixture of Experts: its configuration has no number of "
            "experts; use a MoE model"
        )
    if getattr(config, KEPT, None) is not None:
        raise ValueError(
            f"model {name!r} is a sub-model, cut from one of {getattr(config, CUT_FROM, 'more')} experts; merge it "
            f"into that model, or take {KEPT} out of its config.json to use it as a model of its own"
        )


def what_is_missing(model: nn.Module) -> str:
    """Say in one sentence why a model has no block to serve."""
    config, name = getattr(model, "config", None), type(model).__name__
    counts = [] if config is None else _counts(config)
    if not counts:
        return (
            f"{name} is not a Mixture of Experts: no module of it has the marks of transformers' experts, and its "
            "configuration has no number of experts; use a MoE model"
        )
    if found := next((kind for m in model.modules() if (kind := type(m).__name__).endswith(_BLOCKS)), None):
        return (
            f"{name} has experts ({found}), but they do not run through transformers' experts interface (no module has "
            f"{', '.join(_MARKS)}); fedmoe cannot reach them"
        )
    return f"{name} has {counts[0]} in its configuration but no MoE layer; check which of its layers are sparse"


def counts_experts(key: str) -> bool:
    """Say whether a key of a configuration is a number of routed experts."""
    words = key.split("_")
    return words[-1] == "experts" and ("num" in words or "n" in words) and "shared" not in words


def configs_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """List a configuration and those inside it, such as the text part of a vision model."""
    inside = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(found for child in inside for found in configs_of(child))]


def layer_masks(permitted: Mask, num_experts: Sequence[int]) -> list[np.ndarray]:
    """Make one checked bool (E,) mask for each layer.

    Args:
        permitted: bool (L, E), or (E,) for all layers alike, or one (E_l,) for each layer.
        num_experts: E of each layer.

    Raises:
        ValueError: another dtype or shape, or a layer without any expert.
    """
    layers, most = len(num_experts), max(num_experts)
    if isinstance(permitted, Tensor | np.ndarray):
        mask = permitted.cpu().numpy() if isinstance(permitted, Tensor) else permitted
        if mask.dtype != np.bool_ or mask.shape not in ((layers, most), (most,)) or set(num_experts) != {most}:
            raise ValueError(
                f"permitted is {mask.dtype} of shape {mask.shape}; give a bool mask of shape {(layers, most)}"
                + ("" if set(num_experts) == {most} else ", one for each layer since their sizes differ")
            )
        masks = list(np.broadcast_to(mask, (layers, most)))
    else:
        masks = [np.asarray(mask) for mask in permitted]
        shapes = [(count,) for count in num_experts]
        if [mask.shape for mask in masks] != shapes or any(mask.dtype != np.bool_ for mask in masks):
            raise ValueError(f"permitted has {len(masks)} masks; give one bool mask for each layer, of shapes {shapes}")
    for layer, mask_E in enumerate(masks):
        if not mask_E.any():
            raise ValueError(f"MoE layer {layer} has no permitted expert; permit at least one in every layer")
    return masks


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside peft's wrappers."""
    while isinstance(inside := getattr(module, "base_layer", None), nn.Module):
        module = inside
    return module


def _counts(config: PreTrainedConfig) -> list[str]:
    """The keys of a configuration that give a number of routed experts."""
    keys = {key for part in configs_of(config) for key, value in vars(part).items() if value}
    return sorted(key for key in keys if counts_experts(key))
