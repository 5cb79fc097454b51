"""What a family's own code becomes when its MoE layers keep fewer experts: the cut configuration, and what has rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedmoe_bindings.transformers.split.families import SPLIT
from fedmoe_bindings.transformers.stock.blocks import StockBlock, configs_of, counts_experts, stock_blocks
from fedmoe_kernels.backends import warn_once

_CHOICES = ("per_tok", "per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_selected_experts")
_GROUPS, _BEST_GROUPS = ("n_group", "num_expert_groups"), ("topk_group", "num_limited_groups")


@dataclass(frozen=True)
class Cut:
    """A stock model whose MoE layers keep fewer experts, as its family would build it; on meta, without any number.

    Attributes:
        model: built by the family's own class from the cut configuration.
        blocks: its MoE blocks, in the order of the whole model's.
    """

    model: PreTrainedModel
    blocks: tuple[StockBlock, ...]


def cut_like(model: PreTrainedModel, blocks: Sequence[StockBlock], kept: Sequence[np.ndarray]) -> Cut:
    """Build on meta what ``model`` would be with so many experts in each layer as the ``kept`` ids of one layer.

    Args:
        model: the whole model.
        blocks: its blocks, as ``stock_blocks``.
        kept: ascending ids, as many in every layer.

    Raises:
        ValueError: the family cannot be built so, or its groups of experts do not survive the cut.
    """
    config = copy.deepcopy(model.config)
    whole = blocks[0].num_experts
    for part in configs_of(config):
        _cut_config(part, whole, kept)
    fails = f"{type(model).__name__} cannot be built with {len(kept[0])} of {whole} experts"
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            cut = cast(PreTrainedModel, type(model)(config))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"{fails} ({reason}); permit other experts, or all") from error
    found = stock_blocks(cut)
    if [block.num_experts for block in found] != [len(kept[0])] * len(blocks):
        raise ValueError(
            f"{fails}: the number of its experts is not a plain number of its configuration; use fedmoe_core.MoE"
        )
    inside = tuple(f"{block.name}." if block.name else "" for block in blocks)
    tensors = named_tensors(cut)
    for name, value in named_tensors(model).items():
        if name in tensors and value.shape != tensors[name].shape and not name.startswith(inside):
            raise ValueError(f"{fails}: {name} beside its MoE layers would change, too; use fedmoe_core.MoE")
    return Cut(cut, found)


def _cut_config(config: PreTrainedConfig, whole: int, kept: Sequence[np.ndarray]) -> None:
    """Change what a configuration says of experts, if it says that there are ``whole``."""
    count = len(kept[0])
    keys = [key for key, value in vars(config).items() if counts_experts(key) and value == whole]
    if not keys:
        return
    for key in keys:
        setattr(config, key, count)
    k = getattr(config, "num_experts_per_tok", 0)
    if k > count and getattr(config, SPLIT, None):
        warn_once(
            f"{count} of the k={k} experts that a token of a split model takes are permitted, and the stock router "
            f"multiplies what these add by {k / count:g}; permit at least {k}, or use load_adapter, whose weights are "
            "shares"
        )
    lower_choices(config, count)
    groups = next((key for key in _GROUPS if type(getattr(config, key, None)) is int), None)
    best = next((key for key in _BEST_GROUPS if type(getattr(config, key, None)) is int), None)
    if groups is not None and best is not None and getattr(config, groups) > 1:
        left = _groups_left(getattr(config, groups), whole, kept)
        setattr(config, groups, left)
        setattr(config, best, min(getattr(config, best), left))


def lower_choices(config: PreTrainedConfig, most: int) -> None:
    """Let a configuration choose at most so many experts for each token."""
    for key, value in list(vars(config).items()):
        if type(value) is int and any(key.endswith(word) for word in _CHOICES):
            setattr(config, key, min(value, most))


def _groups_left(groups: int, whole: int, kept: Sequence[np.ndarray]) -> int:
    """How many groups are left, if each keeps equally many experts in every layer or none.

    Raises:
        ValueError: they do not.
    """
    left = set()
    for ids in kept:
        sizes = np.bincount(ids // (whole // groups), minlength=groups)
        if len(set(sizes[sizes > 0])) > 1:
            raise ValueError(
                f"the router chooses among {groups} groups of {whole // groups} experts, of which the mask keeps "
                f"{sizes.tolist()}; permit equally many experts of every group that keeps any, or use fedmoe_core.MoE"
            )
        left.add(int((sizes > 0).sum()))
    if len(left) > 1:
        raise ValueError(f"the layers keep experts of {min(left)} to {max(left)} groups; let all keep as many groups")
    return left.pop()


def rows_of(name: str, whole: Tensor, cut: Tensor, kept: np.ndarray, num_experts: int) -> tuple[int, Tensor] | None:
    """Say which rows of a whole tensor its cut form has.

    Args:
        name: of the tensor, for the message.
        whole, cut: the tensors; only their shapes are read.
        kept: ids of the experts that stay.
        num_experts: E.

    Returns:
        The dimension and the rows along it; None where the shapes agree, so all of it stays.

    Raises:
        ValueError: the tensor changed in another way than by losing the experts that left.
    """
    if whole.shape == cut.shape:
        return None
    each, lost = 1, num_experts - len(kept)
    changed = [d for d in range(whole.dim()) if whole.dim() != cut.dim() or whole.shape[d] != cut.shape[d]]
    if len(changed) == 1 and lost and whole.shape[changed[0]] % num_experts == 0:
        each = whole.shape[changed[0]] // num_experts  # rows of one expert, where experts lie one below the other
    left = -1 if len(changed) != 1 else whole.shape[changed[0]] - lost * each
    if len(changed) != 1 or cut.shape[changed[0]] != left or whole.shape[changed[0]] < num_experts:
        raise ValueError(
            f"{name} is {tuple(whole.shape)}, and {tuple(cut.shape)} with {len(kept)} of {num_experts} experts; "
            "fedmoe cannot tell which of it belongs to which expert"
        )
    # Some routers have more rows than experts, such as one for "no expert"; they come last and stay.
    extra = range(num_experts * each, whole.shape[changed[0]])
    own = [expert * each + row for expert in kept.tolist() for row in range(each)]
    return changed[0], torch.tensor([*own, *extra])


def whole_names(cut: Mapping[str, Tensor], blocks: Sequence[StockBlock], kept: Sequence[np.ndarray]) -> dict[str, str]:
    """Return every tensor's name in the whole model by that in the cut one; other ones where experts are modules."""
    found = {name: name for name in cut}
    for block, ids in zip(blocks, kept, strict=True):
        if not isinstance(block.experts, nn.ModuleDict):
            continue
        keys, place = list(block.experts), f"{block.name}.{block.experts_name}."
        for number, expert in enumerate(ids.tolist()):
            mine, its = f"{place}{keys[number]}.", f"{place}{keys[expert]}."
            found |= {name: its + name.removeprefix(mine) for name in cut if name.startswith(mine)}
    return found


def cut_rows(
    tensors: Mapping[str, Tensor], cut: Mapping[str, Tensor], kept: np.ndarray, num_experts: int
) -> dict[str, tuple[int, Tensor]]:
    """Return ``rows_of`` every tensor that loses rows, by name."""
    found = {name: rows_of(name, value, cut[name], kept, num_experts) for name, value in tensors.items() if name in cut}
    return {name: rows for name, rows in found.items() if rows is not None}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, those that are not saved included; tied ones under every name."""
    parameters: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))
