"""The cost model of a model whose tensors are known by name and shape, before anything of it is measured."""

from __future__ import annotations

import math

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.model.spec import ModelSpec
from fedmoe_kernels.formats import format_named


def cost_model_of(
    spec: ModelSpec,
    *,
    tokens: int,
    train_dense: bool = False,
    lora_rank: int | None = None,
    frozen_format: str | None = None,
) -> CostModel:
    """Make the cost model of a model, not yet calibrated; ``train_dense`` trains every dense tensor.

    Raises:
        ValueError: ``frozen_format`` does not exist, or cannot store matrices of this width.
    """
    w_in = next(p for p in spec.params if p.kind in ("expert", "frozen") and p.name == "w_in")
    of_layers = {p.name for p in spec.params if p.layer >= 0}
    # A correction bias is held by every client, is sent once and never trains: frozen trunk, but for its place.
    corrected = [p for p in spec.params if p.layer >= 0 and p.name == "correction_bias"]
    of_trunk = [p for p in spec.params if p.kind == "dense" or (p.kind == "frozen" and p.layer < 0)] + corrected
    trunk = sum(math.prod(param.shape) for param in of_trunk)
    dense = sum(math.prod(param.shape) for param in spec.params if param.kind == "dense")
    return CostModel(
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        tokens=tokens,
        trunk_params=trunk,
        trunk_trainable=dense if train_dense else 0,
        gated=w_in.shape[1] == 2 * spec.intermediate_size,
        expert_bias="bias_in" in of_layers,
        router_bias="router_bias" in of_layers,
        weight_bytes=w_in.dtype.itemsize,
        grad_bytes=w_in.dtype.itemsize,
        optimizer_bytes=2 * w_in.dtype.itemsize,
        lora_rank=lora_rank,
        base_bytes=None if frozen_format is None else _bytes_per_weight(frozen_format, w_in.shape, spec),
    )


def _bytes_per_weight(frozen_format: str, w_in: tuple[int, ...], spec: ModelSpec) -> float:
    """Return what a weight of an expert takes on average, codes and scales."""
    form, (_, width, hidden) = format_named(frozen_format), w_in
    stored = form.bytes_of(width, hidden) + form.bytes_of(hidden, spec.intermediate_size)
    return stored / (width * hidden + hidden * spec.intermediate_size)
