"""What a pass without gradients costs a client, for surcharges: in full precision or over experts in few bits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from fedmoe_core.budget.cost_model import CostModel
from fedmoe_core.budget.limits import Cost
from fedmoe_kernels.formats import FORMATS


def pass_cost(costs: CostModel, held_LE: np.ndarray, *, tokens: int, form: str | None = None) -> Cost:
    """Return operations and peak memory of forward passes over ``tokens`` tokens, with padding, in training batches.

    Nothing that trains is resident meanwhile. Traffic is not part of it: the caller adds what the pass needs to be
    sent, and what it tells.

    Args:
        costs: the population's cost model.
        held_LE: experts that are held, and may be chosen.
        tokens: over all passes.
        form: what the experts are stored in (``ModelAdapter.configure(frozen_format=...)``); None = as they are.
    """
    # Layers that measure keep their logits and choices until the next batch, and every place has its loss.
    measured = costs.tokens * (costs.num_layers * (4 * costs.num_experts + 8 * costs.top_k) + 16)
    memory = costs.forward_memory(held_LE) + measured
    if form is not None:
        few = coded(costs, form)
        memory = few.forward_memory(held_LE) + measured + _coding_bytes(few, int(held_LE.sum(axis=1).max()))
    return Cost(memory_bytes=memory, flops=costs.forward_flops(held_LE, tokens=tokens))


def _coding_bytes(few: CostModel, held: int) -> int:
    """Return further bytes of codes: while one matrix is multiplied by, or while a layer of ``held`` is laid out.

    To multiply takes the matrix as floats and, where a byte holds two codes, an index of 4 bytes for each. Laid out,
    the codes of one of a layer's two stacks exist twice, one by one and as the stack; that of w_out comes last, and
    that of w_in before there is one of w_out.
    """
    w_out = few.intermediate_size * few.hidden_size
    w_in = few.expert_weights - w_out  # never the smaller one
    stacked = held * max(w_in - w_out, w_out) * (few.base_bytes or 0)
    return max(6 * w_in, math.ceil(stacked))


def coded(costs: CostModel, form: str) -> CostModel:
    """Return the cost model with frozen experts in a format of few bits: their codes and scales."""
    hidden, inner = costs.hidden_size, costs.intermediate_size
    rows_in = costs.expert_weights // hidden - inner
    stored = sum(FORMATS[form].bytes_of(*size) for size in ((rows_in, hidden), (hidden, inner)))
    return replace(costs, base_bytes=stored / costs.expert_weights)
