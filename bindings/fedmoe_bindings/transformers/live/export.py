"""A plain transformers model from a state in global coordinates, to save, share or serve without fedmoe."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fedmoe_bindings.transformers.live.families import Family
from fedmoe_core.base.tensor_key import of_layer


def stock_model(
    cls: Any, like: PreTrainedModel, state: Mapping[str, Tensor], family: Family, blocks: Sequence[str]
) -> PreTrainedModel:
    """Build a stock model from a state in global coordinates; copies, never aliases.

    Every tensor has the dtype and device that it has in the state; buffers are those of ``like``.

    Args:
        cls: a model class, or transformers' automatic classifier class.
        like: a model with the same trunk, whose configuration, generation settings and buffers are taken over.
        state: ``moe.{l}.{ours}`` and ``dense.{name}`` with every expert.
        family: how its MoE blocks are made.
        blocks: their names, in depth order.

    Raises:
        ValueError: transformers has no classifier for this family.
    """
    config, head = copy.deepcopy(like.config), state.get("dense.score.weight")
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
