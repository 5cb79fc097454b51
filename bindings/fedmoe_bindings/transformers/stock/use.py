"""use_fedmoe: a stock transformers model whose experts run on ``moe_mlp``, through transformers' own interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedmoe_bindings.transformers.stock.blocks import Mask, StockBlock, layer_masks, stock_blocks
from fedmoe_bindings.transformers.stock.cut import Cut, cut_like
from fedmoe_bindings.transformers.stock.experts import CHECKED, NAME, fedmoe_experts
from fedmoe_bindings.transformers.stock.forms import form_of
from fedmoe_bindings.transformers.stock.outside import Outside
from fedmoe_bindings.transformers.stock.routers import CutRouter, check_router, set_forward

ALL_EXPERTS_FUNCTIONS.register(NAME, fedmoe_experts)
Model = TypeVar("Model", bound=nn.Module)


def use_fedmoe(model: Model, *, permitted: Mask | None = None, check: bool = True) -> Model:
    """Run a stock model's experts on fedmoe, in place; weights, names and saved files stay transformers' own.

    Args:
        model: any model whose experts run through transformers' experts interface; Switch Transformers, DBRX, Llama 4
            or JetMoE; or a peft model of one.
        permitted: bool (L, E), or (E,) for all layers alike, or one (E_l,) for each layer: route among these experts
            only, exactly as the sub-model that has no others: the family's own router runs on the rows that stay, and
            router logits and auxiliary loss are that sub-model's (where layers keep different numbers there is none;
            their logits have a column for every expert, -inf for those that are not permitted). None = all, and lifts
            an earlier mask. The weights of the others stay in memory, and an optimizer's weight decay would shrink
            them: see ``hold_still``. ``extract_submodel`` makes a model that does not even hold them.
        check: let the first call of each layer compare a few tokens with transformers' eager experts.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no experts that fedmoe reaches, with what was looked for; the mask does not fit; or
            its router cannot route among so few.

    Example:
        >>> import torch
        >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        >>> experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        >>> sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
        >>> model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).eval()
        >>> tokens = torch.arange(8)[None]
        >>> before = model(tokens).logits
        >>> torch.allclose(use_fedmoe(model)(tokens).logits, before, atol=1e-5)
        True
    """
    stock = stock_model_in(model)
    blocks = stock_blocks(stock)
    for block in blocks:
        _check_served(block)
    cuts = None
    if permitted is not None:
        masks = layer_masks(permitted, [block.num_experts for block in blocks])
        cuts = _cut_routers(stock, blocks, [np.flatnonzero(mask_E) for mask_E in masks])
    if any(block.outside is None for block in blocks):
        stock.set_experts_implementation(NAME)
    for number, block in enumerate(blocks):
        if block.outside is None:
            form_of(block.experts)
            # A layer that has shown itself equal need not do so again when the model changes to and fro.
            setattr(block.experts, CHECKED, not check or getattr(block.experts, CHECKED, False))
        elif not isinstance(before := vars(block.experts).get("forward"), Outside) or not (before.checked or check):
            set_forward(block.experts, block.outside(block.experts, check=check))
        set_forward(block.router, None if cuts is None else cuts[number])
    kept = None if cuts is None else {len(cut.kept) for cut in cuts}
    _count_experts(stock, blocks, kept.pop() if kept is not None and len(kept) == 1 else blocks[0].num_experts)
    return model


def stock_model_in(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model itself, or the one inside a peft model.

    Raises:
        ValueError: another wrapper, or another kind of model.
    """
    inside: Any = model
    if not isinstance(inside, PreTrainedModel) and callable(getattr(inside, "get_base_model", None)):
        inside = inside.get_base_model()
    if isinstance(inside, PreTrainedModel):
        return inside
    for name in ("module", "_orig_mod", "_fsdp_wrapped_module", "base_model"):
        if isinstance(getattr(inside, name, None), PreTrainedModel):
            raise ValueError(
                f"the model is wrapped in {type(model).__name__}; call use_fedmoe on the transformers model first and "
                "wrap it after"
            )
    raise ValueError(f"{type(model).__name__} is not a transformers model; pass one, or a peft model of one")


def _check_served(block: StockBlock) -> None:
    """Refuse experts that ask another table than ours for their function, or are stored in codes."""
    weight = next(block.experts.parameters(), None) if block.outside else block.experts.down_proj
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"the experts of {block.name} are stored as {getattr(weight, 'dtype', type(weight).__name__)}; load the "
            "model without quantisation, or build fedmoe_core.MoE layers with frozen_format"
        )


def _cut_routers(model: PreTrainedModel, blocks: Sequence[StockBlock], kept: Sequence[np.ndarray]) -> list[CutRouter]:
    """Make and try the cut router of every layer; nothing of the model changes."""
    counts = sorted({len(ids) for ids in kept})
    cuts: dict[int, Cut] = {}
    for count in counts:
        like = next(ids for ids in kept if len(ids) == count)
        same = [ids if len(ids) == count else like for ids in kept]
        cuts[count] = cut_like(model, blocks, same)
    found = []
    for number, (block, ids) in enumerate(zip(blocks, kept, strict=True)):
        cut = CutRouter(block, cuts[len(ids)].blocks[number], ids, widen=len(counts) > 1)
        check_router(cut, block)
        found.append(cut)
    return found


def _count_experts(model: PreTrainedModel, blocks: Sequence[StockBlock], count: int) -> None:
    """Tell a model, which computes its auxiliary loss from its own count of experts, how many columns logits have."""
    known = {block.num_experts for block in blocks} | {getattr(model, "_fedmoe_count", None)}
    if getattr(model, "num_experts", None) in known - {None}:
        object.__setattr__(model, "num_experts", count)
        object.__setattr__(model, "_fedmoe_count", count)
