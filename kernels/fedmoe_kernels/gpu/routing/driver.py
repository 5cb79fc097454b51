"""The routing operators on a GPU: allocate the outputs, launch the kernels, return what the operators return."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_kernels.gpu.launch import Execute, Launch, cdiv, start
from fedmoe_kernels.gpu.routing import place as placing
from fedmoe_kernels.gpu.routing.choose import Holders, Rule, block_tokens
from fedmoe_kernels.gpu.routing.route import route as route_launches
from fedmoe_kernels.gpu.routing.route_backward import route_backward as route_backward_launches
from fedmoe_kernels.gpu.routing.route_stats import route_stats, splits_for

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
Placed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _chosen(like: Tensor, shape: tuple[int, int], per_block: int, num_slots: int) -> placing.Chosen:
    """Make room for the choices of T tokens, K each."""
    blocks = cdiv(shape[0], per_block)
    return placing.Chosen(_new(like, *shape), _new(like, *shape), _new(like, blocks, num_slots, dtype=torch.int32))


def _rows(chosen: placing.Chosen, per_block: int, execute: Execute) -> Rows:
    """rows_TK, tokens_R, places_R, offsets_B1."""
    _, slots_TK, counts_XB = chosen
    R, num_slots = slots_TK.numel(), counts_XB.shape[1]
    rows = torch.empty_like(slots_TK), _new(slots_TK, R), _new(slots_TK, R), _new(slots_TK, num_slots + 1)
    totals_B = _new(slots_TK, num_slots, dtype=torch.int32)
    start(placing.rows(chosen, per_block, torch.empty_like(counts_XB), totals_B, rows), execute)
    return rows


def route(
    logits_TE: Tensor,
    holders: Holders,
    bias_E: Tensor | None,
    rule: Rule,
    *,
    num_slots: int,
    with_stats: bool,
    execute: Execute = Launch.run,
) -> Routed:
    """Return what `routing.ops.route_op` does, in 2 launches, 4 if blocks * B exceeds 4096, and 1 or 2 for statistics.

    Tokens of a client outside [0, C) get no row. Nothing waits for the device.
    """
    with torch.cuda.device_of(logits_TE):
        logits_TE, holders = logits_TE.contiguous(), holders.contiguous
        bias_E = None if bias_E is None else bias_E.contiguous()
        (T, E), table_CE = logits_TE.shape, holders.table_CE
        per_block = block_tokens(rule.k, E)
        weights_TK = _new(logits_TE, T, rule.k, dtype=torch.float32)
        chosen = _chosen(logits_TE, (T, rule.k), per_block, num_slots)
        start(route_launches(logits_TE, holders, bias_E, rule, weights_TK=weights_TK, chosen=chosen), execute)
        rows = _rows(chosen, per_block, execute)
        clients = table_CE.shape[0] if with_stats else 0
        stats_C4E = _new(logits_TE, clients, 4, E, dtype=torch.float64)
        tokens_C = _new(logits_TE, clients, dtype=torch.float64)
        if with_stats:
            splits = splits_for(T, clients, E, rule)
            launches = route_stats(
                *(logits_TE, chosen.experts_TK, holders, bias_E, rule),
                whole=num_slots == table_CE.numel(),
                parts_CS4E=_new(logits_TE, clients, splits, 4, E),
                part_tokens_CS=_new(logits_TE, clients, splits),
                stats_C4E=stats_C4E,
                tokens_C=tokens_C,
            )
            start(launches, execute)
    return weights_TK, chosen.experts_TK, chosen.slots_TK, *rows, stats_C4E, tokens_C


def route_backward(
    grad_TK: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    holders: Holders,
    rule: Rule,
    *,
    execute: Execute = Launch.run,
) -> Tensor:
    """Compute dL/dlogits (T, E) in one launch."""
    with torch.cuda.device_of(logits_TE):
        out_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
        grad_TK, logits_TE, experts_TK = (t.contiguous() for t in (grad_TK, logits_TE, experts_TK))
        start(route_backward_launches(grad_TK, logits_TE, experts_TK, holders.contiguous, rule, out_TE=out_TE), execute)
    return out_TE


def place(experts_TK: Tensor, holders: Holders, *, num_slots: int, execute: Execute = Launch.run) -> Placed:
    """Return what `routing.ops.place_rows_op` does, in 2 launches (4 where blocks * B exceeds 4096)."""
    with torch.cuda.device_of(experts_TK):
        T, K = experts_TK.shape
        per_block = block_tokens(K)
        chosen = _chosen(experts_TK, (T, K), per_block, num_slots)
        start(placing.slots(experts_TK.contiguous(), holders.contiguous, per_block, chosen=chosen), execute)
        return chosen.experts_TK, chosen.slots_TK, *_rows(chosen, per_block, execute)
