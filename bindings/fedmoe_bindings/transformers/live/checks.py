"""What is refused before a live model becomes a sub-model: a state or a sub-model that does not fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedmoe_core.base.tensor_key import TensorKey
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.slots import OwnRows
from fedmoe_core.model.spec import ModelSpec
from fedmoe_core.model.submodel import SubModel
from fedmoe_kernels.backends import warn_once


def check_state(state: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Refuse a state that lacks a tensor of the model or has one of another shape.

    Raises:
        ValueError: it does.
    """
    for param in spec.params:
        if param.key not in state:
            raise ValueError(f"the state has no {param.key}; it is not a state of this model")
        if tuple(state[param.key].shape) != param.shape:
            found = tuple(state[param.key].shape)
            raise ValueError(f"the state's {param.key} has shape {found}; this model needs {param.shape}")


def check_rows(rows: OwnRows, spec: ModelSpec, *, adapters: bool) -> None:
    """Refuse rows of tensors that have none.

    Raises:
        ValueError: they are of a tensor outside the MoE layers, or one that the model does not have.
    """
    known = {param.key for param in spec.params if param.layer >= 0}
    if adapters:
        known |= {str(TensorKey(number, name)) for number in range(spec.num_layers) for name in FACTORS}
    if strange := sorted(set(rows) - known):
        raise ValueError(f"rows are given for {strange[0]}; only tensors of MoE layers have rows")


def check_form(submodel: SubModel, spec: ModelSpec, layers: Sequence[MoE], *, adapters: bool) -> None:
    """Refuse masks that do not fit the layers, and a top_k or rank that the model cannot have.

    Raises:
        ValueError: they do not.
    """
    if submodel.top_k is not None and not 1 <= submodel.top_k <= spec.top_k:
        raise ValueError(f"top_k={submodel.top_k} is outside 1 to {spec.top_k}, the model's own")
    permitted, trainable = (
        [None] * len(layers) if mask_LE is None else list(mask_LE)
        for mask_LE in (submodel.permitted_LE, submodel.trainable_LE)
    )
    if not len(permitted) == len(trainable) == len(layers):
        raise ValueError(
            f"the masks have {len(permitted)} and {len(trainable)} rows; this model has {len(layers)} MoE layers"
        )
    for layer, held_E, trains_E in zip(layers, permitted, trainable, strict=True):
        layer.check_masks(held_E, trains_E)
    if submodel.lora_rank is not None and not adapters:
        raise ValueError(f"lora_rank={submodel.lora_rank}, but this model has no adapters; call add_lora first")


def warn_of_factor(submodel: SubModel, spec: ModelSpec, *, renormalizes: bool) -> None:
    """Warn, once, where weights that are renormalised multiply the outputs of a split model's few experts.

    Outputs of a split model add up, each with a weight of about 1 / k. Where a token has k' < k choices, renormalised
    weights are k / k' times too large.
    """
    asked = spec.top_k if submodel.top_k is None else submodel.top_k
    served = spec.num_experts
    if submodel.permitted_LE is not None:
        aliased_LE = False if submodel.alias_LE is None else submodel.alias_LE >= 0
        served = int((submodel.permitted_LE | aliased_LE).sum(axis=1).min())
    if renormalizes and min(asked, served) < (k := spec.top_k):
        # Without the numbers of this client, so that a run with many of them says it once.
        warn_once(
            f"some client's tokens choose n < {k} experts of a split model, and renormalised weights multiply what "
            f"these add by {k} / n, so one expert by {k}; set train.absent=auto, or share"
        )
