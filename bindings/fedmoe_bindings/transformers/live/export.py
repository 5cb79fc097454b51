"""A plain transformers model from a state in global coordinates, to save, share or serve without fedmoe."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fedmoe_bindings.transformers.live.families import Family
from fedmoe_bindings.transformers.live.load import SequenceClassifier
from fedmoe_bindings.transformers.stock.blocks import configs_of
from fedmoe_bindings.transformers.stock.cut import lower_choices
from fedmoe_core.base.tensor_key import of_layer
from fedmoe_core.layer.moe import MoE


def stock_of(
    root: nn.Module,
    state: Mapping[str, Tensor],
    family: Family,
    layers: Sequence[MoE],
    *,
    head: bool = True,
    top_k: int | None = None,
) -> PreTrainedModel:
    """Build the stock model of a live one from a state in global coordinates.

    Args:
        root: the live causal LM or ``SequenceClassifier``, of which names, configuration and buffers are taken.
        state: with every expert.
        family: how its MoE blocks are made.
        layers: its MoE layers that federation trains.
        head: of a classifier; without it its trunk comes back, whatever it pools.
        top_k: most experts per token; None = as the configuration says.

    Raises:
        ValueError: transformers has no model with this head or grafts.
    """
    live = root.model if isinstance(root, SequenceClassifier) and not head else root
    places = {module: name for name, module in live.named_modules() if isinstance(module, MoE)}
    if len(places) > len(layers):
        raise ValueError("transformers has no model with grafted mixtures; save the state instead")
    blocks = list(places.values())
    if not isinstance(live, SequenceClassifier):
        if live is not root:
            state = {key.replace("dense.model.", "dense.", 1): value for key, value in state.items()}
            del state["dense.score.weight"]
        return stock_model(type(live), cast(PreTrainedModel, live), state, family, blocks, top_k=top_k)
    if live.pool != "last":
        raise ValueError(
            "transformers' classifiers pool the last token, and this one the mean; take a model from a directory "
            "(pool='last'), or its trunk alone by export(head=False)"
        )
    return stock_model(AutoModelForSequenceClassification, live.model, state, family, blocks, top_k=top_k)


def stock_model(
    cls: Any,
    like: PreTrainedModel,
    state: Mapping[str, Tensor],
    family: Family,
    blocks: Sequence[str],
    *,
    top_k: int | None = None,
) -> PreTrainedModel:
    """Build a stock model from a state in global coordinates; copies, never aliases.

    Every tensor has the dtype and device that it has in the state; buffers are those of ``like``.

    Args:
        cls: a model class, or transformers' automatic classifier class.
        like: a model with the same trunk, whose configuration, generation settings and buffers are taken over.
        state: ``moe.{l}.{ours}`` and ``dense.{name}`` with every expert.
        family: how its MoE blocks are made.
        blocks: their names, in depth order.
        top_k: most experts per token; None = as the configuration says.

    Raises:
        ValueError: transformers has no classifier for this family.
    """
    config, head = copy.deepcopy(like.config), state.get("dense.score.weight")
    if top_k is not None:
        for part in configs_of(config):
            lower_choices(part, top_k)
    if head is not None:
        config.num_labels = head.shape[0]
    build = cls.from_config if cls is AutoModelForSequenceClassification else cls
    with torch.random.fork_rng(devices=[]):
        try:
            model: PreTrainedModel = build(config)
        except ValueError as error:
            raise ValueError(
                f"transformers has no classifier for {config.model_type!r}; export(head=False) gives its trunk"
            ) from error
    weights = {key.removeprefix("dense."): value for key, value in state.items() if key.startswith("dense.")}
    for layer, block in enumerate(blocks):
        weights |= family.stock_tensors(block, of_layer(layer, state))
    # Tied tensors are listed once in a state; every other parameter must be there.
    lacking = set(dict(model.named_parameters())) - set(weights)
    if lacking:
        raise ValueError(f"the state has no {min(lacking)}; it is not a state of this model")
    _take_over(model, weights, like)
    if getattr(like, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.eval()


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast a model's parameters in place, and no buffer: a rotary table in 16 bits is wrong from some position on."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _take_over(model: PreTrainedModel, weights: Mapping[str, Tensor], like: nn.Module) -> None:
    """Put copies of the weights and of the other model's buffers into a fresh model, tied parameters tied."""
    device = next(iter(weights.values())).device
    places = dict(model.named_modules())
    found: dict[str, Tensor] = dict(like.named_buffers()) | dict(weights)
    for name, old in [*model.named_parameters(), *model.named_buffers()]:
        value = found.get(name, old).detach().to(device, copy=True)
        if isinstance(old, nn.Parameter):
            old.data = value
        else:
            inside, _, own = name.rpartition(".")
            setattr(places[inside], own, value)
