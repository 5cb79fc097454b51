"""The routing operators on a GPU: allocate the outputs, launch the kernels, return what the operators return."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_kernels.gpu.launch import Execute, Launch, cdiv
from fedmoe_kernels.gpu.routing import place as placing
from fedmoe_kernels.gpu.routing.choose import Holders, Rule, block_tokens
from fedmoe_kernels.gpu.routing.route import route as route_launches
from fedmoe_kernels.gpu.routing.route_backward import route_backward as route_backward_launches
from fedmoe_kernels.gpu.routing.route_stats import route_stats, splits_for

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
Placed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Routed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _holders(table_CE: Tensor, client_T: Tensor | None, valid_T: Tensor | None) -> Holders:
    return Holders(
        table_CE.contiguous(),
        None if client_T is None else client_T.contiguous(),
        None if valid_T is None else valid_T.contiguous(),
    )


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _counts(like: Tensor, tokens: int, per_block: int, num_slots: int) -> Tensor:
    return _new(like, cdiv(tokens, per_block), num_slots, dtype=torch.int32)


def _rows(slots_TK: Tensor, counts_XB: Tensor, per_block: int, execute: Execute) -> Rows:
    """rows_TK, tokens_R, places_R, offsets_B1."""
    R, num_slots = slots_TK.numel(), counts_XB.shape[1]
    rows_TK, tokens_R, places_R = torch.empty_like(slots_TK), _new(slots_TK, R), _new(slots_TK, R)
    offsets_B1 = _new(slots_TK, num_slots + 1)
    launches = placing.rows(
        slots_TK,
        counts_XB,
        per_block=per_block,
        before_XB=torch.empty_like(counts_XB),
        totals_B=_new(slots_TK, num_slots, dtype=torch.int32),
        rows_TK=rows_TK,
        tokens_R=tokens_R,
        places_R=places_R,
        offsets_B1=offsets_B1,
    )
    for launch in launches:
        execute(launch)
    return rows_TK, tokens_R, places_R, offsets_B1


def route(
    logits_TE: Tensor,
    table_CE: Tensor,
    client_T: Tensor | None,
    valid_T: Tensor | None,
    bias_E: Tensor | None,
    *,
    num_slots: int,
    rule: Rule,
    with_stats: bool,
    execute: Execute = Launch.run,
) -> Routed:
    """Return what `routing.ops.route_op` does, in 2 launches, 4 if blocks * B exceeds 4096, and 1 or 2 for statistics.

    Tokens of a client outside [0, C) get no row. Nothing waits for the device.
    """
    with torch.cuda.device_of(logits_TE):
        logits_TE, holders = logits_TE.contiguous(), _holders(table_CE, client_T, valid_T)
        bias_E = None if bias_E is None else bias_E.contiguous()
        T, E = logits_TE.shape
        per_block = block_tokens(rule.k, E)
        weights_TK = _new(logits_TE, T, rule.k, dtype=torch.float32)
        experts_TK, slots_TK = _new(logits_TE, T, rule.k), _new(logits_TE, T, rule.k)
        counts_XB = _counts(logits_TE, T, per_block, num_slots)
        for launch in route_launches(
            logits_TE,
            holders,
            bias_E,
            rule,
            num_slots=num_slots,
            weights_TK=weights_TK,
            experts_TK=experts_TK,
            slots_TK=slots_TK,
            counts_XB=counts_XB,
        ):
            execute(launch)
        rows = _rows(slots_TK, counts_XB, per_block, execute)
        clients = table_CE.shape[0] if with_stats else 0
        stats_C4E = _new(logits_TE, clients, 4, E, dtype=torch.float64)
        tokens_C = _new(logits_TE, clients, dtype=torch.float64)
        if with_stats:
            splits = splits_for(T, clients, E, rule)
            for launch in route_stats(
                logits_TE,
                experts_TK,
                holders,
                bias_E,
                rule,
                whole=num_slots == table_CE.numel(),
                parts_CS4E=_new(logits_TE, clients, splits, 4, E),
                part_tokens_CS=_new(logits_TE, clients, splits),
                stats_C4E=stats_C4E,
                tokens_C=tokens_C,
            ):
                execute(launch)
    return weights_TK, experts_TK, slots_TK, *rows, stats_C4E, tokens_C


def route_backward(
    grad_TK: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    table_CE: Tensor,
    client_T: Tensor | None,
    *,
    rule: Rule,
    execute: Execute = Launch.run,
) -> Tensor:
    """Compute dL/dlogits (T, E) in one launch."""
    with torch.cuda.device_of(logits_TE):
        out_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
        for launch in route_backward_launches(
            grad_TK.contiguous(),
            logits_TE.contiguous(),
            experts_TK.contiguous(),
            _holders(table_CE, client_T, None),
            rule,
            out_TE=out_TE,
        ):
            execute(launch)
    return out_TE


def place(
    experts_TK: Tensor,
    table_CE: Tensor,
    client_T: Tensor | None,
    valid_T: Tensor | None,
    *,
    num_slots: int,
    execute: Execute = Launch.run,
) -> Placed:
    """Return what `routing.ops.place_rows_op` does, in 2 launches (4 where blocks * B exceeds 4096)."""
    with torch.cuda.device_of(experts_TK):
        T, K = experts_TK.shape
        per_block = block_tokens(K)
        kept_TK, slots_TK = _new(experts_TK, T, K), _new(experts_TK, T, K)
        counts_XB = _counts(experts_TK, T, per_block, num_slots)
        for launch in placing.slots(
            experts_TK.contiguous(),
            _holders(table_CE, client_T, valid_T),
            num_slots=num_slots,
            per_block=per_block,
            experts_TK=kept_TK,
            slots_TK=slots_TK,
            counts_XB=counts_XB,
        ):
            execute(launch)
        return kept_TK, slots_TK, *_rows(slots_TK, counts_XB, per_block, execute)
