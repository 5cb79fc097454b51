"""Plain transformers models: cut out a sub-model, put it back, or build one from a state in global coordinates."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from fedmoe_bindings.transformers.families import family_of, layer_masks, sparse_blocks
from fedmoe_core.base.tensor_key import of_layer

KEPT = "fedmoe_kept_experts"  # in config.json: expert ids per MoE layer, in the coordinates of the model cut from


def extract_submodel(model: PreTrainedModel, permitted_LE: np.ndarray | Tensor) -> PreTrainedModel:
    """Cut out a stock model of the same class that has only the permitted experts; copies, never aliases.

    It saves and loads with ``save_pretrained`` and ``from_pretrained`` like any other, and its configuration carries
    the kept expert ids as ``fedmoe_kept_experts``. Its outputs are those of the full model routed under the mask.

    Args:
        model: a Qwen3-MoE, OLMoE or Mixtral model.
        permitted_LE: bool (L, E), or (E,) for all layers alike; the same number of experts in every layer, since a
            transformers configuration has one number for all.

    Raises:
        ValueError: the family is not served, the mask does not fit, or its layers keep different numbers.
    """
    family, blocks = family_of(model.config), sparse_blocks(model, model.config)
    mask_LE = layer_masks(permitted_LE, blocks)
    counts = mask_LE.sum(axis=1)
    if counts.min() != counts.max():
        raise ValueError(
            f"the layers keep {counts.min()} to {counts.max()} experts, transformers has one number for all; "
            "permit equally many in each, or use fedmoe_core.MoE"
        )
    kept = [np.flatnonzero(row).tolist() for row in mask_LE]
    config = copy.deepcopy(model.config)
    setattr(config, family.experts_key, int(counts[0]))
    config.num_experts_per_tok = min(config.num_experts_per_tok, int(counts[0]))
    setattr(config, KEPT, kept)
    state = model.state_dict()
    for block, ids in zip(blocks, kept, strict=True):
        for name in family.names(block.name).values():
            state[name] = state[name][ids]
    # The fresh weights are overwritten at once; the fork keeps their draws out of the caller's random stream.
    with torch.random.fork_rng(devices=[]):
        sub = cast(nn.Module, type(model)(config)).to(dtype=model.dtype, device=model.device)
    sub.load_state_dict(state)
    return cast(PreTrainedModel, sub.train(model.training))


def merge_submodel(
    full_model: PreTrainedModel, sub_model: PreTrainedModel, permitted_LE: np.ndarray | Tensor | None = None
) -> PreTrainedModel:
    """Write a sub-model's weights back into the full model, in place; experts it does not hold keep their bits.

    Args:
        full_model: the model that ``sub_model`` was cut from.
        sub_model: made by ``extract_submodel``, perhaps trained, perhaps saved and loaded since.
        permitted_LE: the mask it was cut with; None = as its configuration says.

    Returns:
        ``full_model``.

    Raises:
        ValueError: the sub-model does not say which experts it holds, or not those of the mask, or does not fit.
    """
    family, blocks = family_of(full_model.config), sparse_blocks(full_model, full_model.config)
    kept = getattr(sub_model.config, KEPT, None)
    if permitted_LE is not None:
        asked = [np.flatnonzero(row).tolist() for row in layer_masks(permitted_LE, blocks)]
        if kept is not None and kept != asked:
            raise ValueError("the sub-model was cut with another mask; pass that mask, or none")
        kept = asked
    if kept is None:
        raise ValueError(f"the sub-model's configuration has no {KEPT}; pass the mask it was cut with")
    if len(kept) != len(blocks):
        raise ValueError(f"the sub-model has {len(kept)} MoE layers, the full model {len(blocks)}; they must agree")
    rows_of = {name: ids for block, ids in zip(blocks, kept, strict=True) for name in family.names(block.name).values()}
    full_state, sub_state = full_model.state_dict(), sub_model.state_dict()
    for name, whole in full_state.items():
        part = sub_state.get(name)
        want = (len(rows_of[name]), *whole.shape[1:]) if name in rows_of else tuple(whole.shape)
        if part is None or tuple(part.shape) != want:
            found = "absent" if part is None else f"of shape {tuple(part.shape)}"
            raise ValueError(f"{name} is {found} in the sub-model; the full model needs {want}")
        if name in rows_of and not all(0 <= e < whole.shape[0] for e in rows_of[name]):
            raise ValueError(f"the sub-model keeps expert {max(rows_of[name])} of {name}, which has {whole.shape[0]}")
    with torch.no_grad():
        for name, whole in full_state.items():
            part = sub_state[name].to(device=whole.device, dtype=whole.dtype)
            if name in rows_of:
                whole[rows_of[name]] = part
            else:
                whole.copy_(part)
    return full_model


def stock_model(
    cls: Any, config: PreTrainedConfig, state: Mapping[str, Tensor], names: Sequence[Mapping[str, str]]
) -> PreTrainedModel:
    """Build a stock model from a state in global coordinates; copies, never aliases.

    Args:
        cls: a model class, or transformers' automatic classifier class.
        config: of the model; not changed.
        state: ``moe.{l}.{ours}`` and ``dense.{name}`` with every expert.
        names: stock names of the tensors of each MoE block by ours, in depth order; see ``Family.names``.

    Raises:
        ValueError: transformers has no classifier for this family.
    """
    config, head = copy.deepcopy(config), state.get("dense.score.weight")
    if head is not None:
        config.num_labels = head.shape[0]
    build = cls.from_config if cls is AutoModelForSequenceClassification else cls
    with torch.random.fork_rng(devices=[]):
        try:
            model = build(config)
        except ValueError as error:
            raise ValueError(f"transformers has no classifier for {config.model_type!r}; export its trunk") from error
    weights = {key.removeprefix("dense."): value for key, value in state.items() if key.startswith("dense.")}
    for layer, stock in enumerate(names):
        own = of_layer(layer, state)
        weights |= {name: own[ours] for ours, name in stock.items()}
    model = model.to(state["moe.0.router"])
    # Tied tensors are listed once in a state; every other parameter must be there.
    lacking = set(dict(model.named_parameters())) - set(weights)
    if lacking:
        raise ValueError(f"the state has no {min(lacking)}; it is not a state of this model")
    model.load_state_dict(weights, strict=False)
    return model.eval()
