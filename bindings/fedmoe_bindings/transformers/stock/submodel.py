"""Plain transformers models of fewer experts: cut one out, and put what it learned back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedmoe_bindings.transformers.stock.blocks import CUT_FROM, KEPT, Mask, StockBlock, layer_masks, stock_blocks
from fedmoe_bindings.transformers.stock.cut import Cut, cut_like, cut_rows, named_tensors, whole_names

Model = TypeVar("Model", bound=PreTrainedModel)


def extract_submodel(model: Model, permitted: Mask) -> Model:
    """Cut out a stock model of the same class that has only the permitted experts; copies, never aliases.

    It runs, saves and loads like any other, without fedmoe, and its outputs are those of the whole model routed under
    the mask (``use_fedmoe(permitted=)``). Each tensor keeps its own dtype, device and ``requires_grad``; generation
    settings come along, and the configuration carries the kept expert ids as ``fedmoe_kept_experts``.

    Args:
        model: a model whose experts run through transformers' experts interface.
        permitted: bool (L, E), or (E,) for all layers alike; the same number of experts in every layer, since a
            transformers configuration has one number for all.

    Raises:
        ValueError: the model has no experts that can be cut, the mask does not fit, or its layers keep different
            numbers.

    Example:
        >>> import torch
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_local_experts=4)
        >>> model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
        >>> small = extract_submodel(model, torch.tensor([True, False, True, False]))
        >>> small.config.num_local_experts, small.config.fedmoe_kept_experts
        (2, [[0, 2], [0, 2]])
    """
    blocks = stock_blocks(model)
    kept = [np.flatnonzero(mask_E) for mask_E in layer_masks(permitted, [block.num_experts for block in blocks])]
    counts = {len(ids) for ids in kept}
    if len(counts) > 1:
        raise ValueError(
            f"the layers keep {min(counts)} to {max(counts)} experts, transformers has one number for all; "
            "permit equally many in each, or use fedmoe_core.MoE"
        )
    cut = cut_like(model, blocks, kept)
    sub, rows = cast(Model, cut.model), _rows(model, blocks, cut, kept)
    _fill(sub, model, rows, whole_names(named_tensors(sub), blocks, kept))
    setattr(sub.config, KEPT, [ids.tolist() for ids in kept])
    setattr(sub.config, CUT_FROM, blocks[0].num_experts)
    if getattr(model, "generation_config", None) is not None:
        sub.generation_config = copy.deepcopy(model.generation_config)
    _take_modes(sub, model)
    return sub


def merge_submodel(full_model: Model, sub_model: PreTrainedModel, permitted: Mask | None = None) -> Model:
    """Write what a sub-model changed back into the full model, in place; all else keeps its bits.

    A tensor, or the rows of one expert, is written if it is not what the full model's would be in the sub-model's
    dtype. So a sub-model that was cast to 16 bits rounds only what it trained.

    Args:
        full_model: the model that ``sub_model`` was cut from.
        sub_model: made by ``extract_submodel``, perhaps trained, perhaps saved and loaded since.
        permitted: the mask it was cut with; None = as its configuration says.

    Returns:
        ``full_model``.

    Raises:
        ValueError: the sub-model does not say which experts it holds, or not those of the mask, or does not fit.
    """
    blocks = stock_blocks(full_model)
    kept = _kept(blocks, sub_model, permitted)
    rows = _rows(full_model, blocks, Cut(sub_model, stock_blocks(sub_model)), kept)
    part_of = named_tensors(sub_model)
    names = whole_names(part_of, blocks, kept)
    saved, whole_of = set(full_model.state_dict()), named_tensors(full_model)
    absent = _absent(blocks, kept)
    if lacking := sorted(name for name in saved - set(names.values()) if not name.startswith(absent)):
        raise ValueError(f"the sub-model has no {lacking[0]}; it was not cut from this model")
    with torch.no_grad():
        for mine, its in names.items():
            if its in saved:
                _write(whole_of[its], part_of[mine].to(whole_of[its].device), rows.get(mine))
    return full_model


def _kept(blocks: Sequence[StockBlock], sub_model: PreTrainedModel, permitted: Mask | None) -> list[np.ndarray]:
    """The expert ids that each layer of the sub-model holds, checked against the full model and the mask."""
    counts = [block.num_experts for block in blocks]
    kept = getattr(sub_model.config, KEPT, None)
    if permitted is not None:
        asked = [np.flatnonzero(mask_E).tolist() for mask_E in layer_masks(permitted, counts)]
        if kept is not None and kept != asked:
            raise ValueError("the sub-model was cut with another mask; pass that mask, or none")
        kept = asked
    if kept is None:
        raise ValueError(f"the sub-model's configuration has no {KEPT}; pass the mask it was cut with")
    if len(kept) != len(blocks):
        raise ValueError(f"the sub-model has {len(kept)} MoE layers, the full model {len(blocks)}; they must agree")
    whole = getattr(sub_model.config, CUT_FROM, counts[0])
    if whole != counts[0]:
        raise ValueError(f"the sub-model was cut from {whole} experts, the full model has {counts[0]}; pass its own")
    for layer, (ids, count) in enumerate(zip(kept, counts, strict=True)):
        if ids != sorted(set(ids)) or not all(0 <= e < count for e in ids):
            raise ValueError(f"the sub-model keeps experts {ids} in MoE layer {layer}, which has {count}")
    return [np.asarray(ids, dtype=np.int64) for ids in kept]


def _absent(blocks: Sequence[StockBlock], kept: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The names, up to their last dot, of experts that are single modules and do not stay."""
    return tuple(
        f"{block.name}.{block.experts_name}.{key}."
        for block, ids in zip(blocks, kept, strict=True)
        if isinstance(block.experts, nn.ModuleDict)
        for number, key in enumerate(block.experts)
        if number not in ids
    )


def _rows(
    whole: nn.Module, blocks: Sequence[StockBlock], cut: Cut, kept: Sequence[np.ndarray]
) -> dict[str, tuple[int, Tensor]]:
    """Which rows of which tensors stay, by name in the cut model; everything else has one shape in both.

    Raises:
        ValueError: a tensor has another shape in the cut model, and not for its experts' sake.
    """
    parts = named_tensors(cut.model)
    names, own = whole_names(parts, blocks, kept), named_tensors(whole)
    tensors = {mine: own[its] for mine, its in names.items() if its in own}
    found: dict[str, tuple[int, Tensor]] = {}
    for block, ids in zip(blocks, kept, strict=True):
        inside = {name: value for name, value in tensors.items() if name.startswith(f"{block.name}.")}
        found |= cut_rows(inside, parts, ids, block.num_experts)
    for name, value in tensors.items():
        if name in parts and name not in found and value.shape != parts[name].shape:
            raise ValueError(
                f"{name} is {tuple(parts[name].shape)} in the sub-model, {tuple(value.shape)} in the full model; "
                "they are not one model"
            )
    return found


def _fill(
    sub: PreTrainedModel, model: PreTrainedModel, rows: dict[str, tuple[int, Tensor]], names: dict[str, str]
) -> None:
    """Give a model on meta copies of another's tensors, those with experts by their rows; tied ones stay tied.

    ``names`` are those of the whole model by those of the cut one.
    """
    made: dict[int, Any] = {}
    places, whole = dict(sub.named_modules()), named_tensors(model)
    for name, its in names.items():
        if its not in whole:
            continue
        value = whole[its]
        inside, _, own = name.rpartition(".")
        if id(value) not in made:
            dim, kept = rows.get(name, (0, None))
            part = value.detach().clone() if kept is None else value.detach().index_select(dim, kept.to(value.device))
            trains = value.requires_grad
            made[id(value)] = nn.Parameter(part, requires_grad=trains) if isinstance(value, nn.Parameter) else part
        setattr(places[inside], own, made[id(value)])
    for name, value in _plain_tensors(model).items():
        inside, _, own = name.rpartition(".")
        if inside in places:
            setattr(places[inside], own, value.clone())
    left = [name for name, value in (named_tensors(sub) | _plain_tensors(sub)).items() if value.device.type == "meta"]
    if left and next(iter(named_tensors(model).values())).device.type != "meta":
        raise ValueError(f"{left[0]} of the cut model has no counterpart in the whole one; use fedmoe_core.MoE")


def _take_modes(sub: nn.Module, model: nn.Module) -> None:
    """Let every module train or not, and repeat its forward or not, as the one of the same name does."""
    whole = dict(model.named_modules())
    for name, module in sub.named_modules():
        like = whole.get(name, model)
        module.training = like.training
        for flag in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if flag in vars(like):
                setattr(module, flag, vars(like)[flag])


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules hold as plain attributes, by name."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _write(whole: Tensor, part: Tensor, rows: tuple[int, Tensor] | None) -> None:
    """Write a part into the whole where it differs, one expert's rows at a time."""
    if rows is None:
        if not _same(whole, part):
            whole.copy_(part.to(whole.dtype))
        return
    dim, kept = rows
    for place, row in enumerate(kept.tolist()):
        old, new = whole.select(dim, row), part.select(dim, place)
        if not _same(old, new):
            old.copy_(new.to(whole.dtype))


def _same(whole: Tensor, part: Tensor) -> bool:
    """Whether the part is what the whole becomes in the part's dtype; NaN is the same as NaN."""
    rounded = whole.to(part.dtype)
    return bool(((rounded == part) | ((rounded != rounded) & (part != part))).all())
