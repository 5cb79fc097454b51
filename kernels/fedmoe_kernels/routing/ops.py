"""The custom ops behind routing: tensors in, tensors out, every size known from the shapes, and nothing mutated.

Each operator has two bodies. The one here is plain tensor code without per-token Python that asks no device for a
value, so it runs wherever torch does; the other, `gpu.routing`, launches Triton kernels. `backend` says which (see
`backends.use_triton`). The rules are in the docstring of `routing.route`.
A table_CE is (C, E) int64: the slot of each expert of each client, -1 = absent; C = 1 without a cohort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedmoe_kernels.backends import use_triton
from fedmoe_kernels.operator import Operator, function_of, last_derivative, transformed_of
from fedmoe_kernels.routing.rules import MOST_CHOICES, MOST_EXPERTS, MOST_TOKENS, SIGMOID_EPS, compute_dtype


def _finite(logits_TE: Tensor) -> Tensor:
    """Logits in the compute dtype, in [-inf, max]: NaN becomes -inf (never chosen), +inf the largest finite number."""
    dtype = compute_dtype(logits_TE.dtype)
    return logits_TE.to(dtype).nan_to_num(nan=-math.inf, posinf=torch.finfo(dtype).max, neginf=-math.inf)


def _hide_absent(logits_TE: Tensor, table_CE: Tensor, client_T: Tensor | None) -> Tensor:
    """-inf where the token's client does not hold the expert."""
    absent = table_CE < 0
    return logits_TE.masked_fill(absent[0] if client_T is None else absent[client_T], -math.inf)


def _top(choice_TE: Tensor, k: int) -> Tensor:
    """The k best experts of each token, best first, ties by lowest index, -1 where only -inf is left.

    k passes of max, which returns the first of equals (topk promises no order): 2.5 ms at (4096, 64), k = 8, on one
    thread, against 2.7 ms for topk and 6.7 ms for a stable sort.
    """
    left_TE, picked = choice_TE.clone(), []
    for _ in range(k):
        best, expert = left_TE.max(dim=-1)
        picked.append(torch.where(best > -math.inf, expert, -1))
        left_TE.scatter_(1, expert[:, None], -math.inf)
    return torch.stack(picked, dim=1)


def _sigmoid(logits: Tensor) -> Tensor:
    """Equal logits give equal bits wherever they lie, so that ties are ties.

    torch.sigmoid rounds a vector's tail otherwise than its body (4 % of float32 values differ), exp and / do not.
    """
    return 1 / (1 + (-logits).exp())


def _choose(logits_TE: Tensor, k: int, scoring: str, bias_E: Tensor | None, groups: tuple[int, int]) -> Tensor:
    """experts_TK chosen by each token from its logits above -inf; -1 fills the places that nothing is left for."""
    if scoring != "sigmoid":
        return _top(logits_TE, k)
    choice_TE = _sigmoid(logits_TE)
    if bias_E is not None:
        choice_TE = (choice_TE + bias_E.to(choice_TE.dtype)).nan_to_num(-math.inf, math.inf, -math.inf)
    choice_TE = choice_TE.masked_fill(logits_TE == -math.inf, -math.inf)
    n_group, topk_group = groups
    if n_group == 1:
        return _top(choice_TE, k)
    T, size = choice_TE.shape[0], choice_TE.shape[1] // n_group
    best_TG2 = choice_TE.view(T, n_group, size).topk(min(2, size), dim=-1).values
    second_TG = best_TG2[..., 1:].masked_fill(best_TG2[..., 1:] == -math.inf, 0.0).sum(-1)
    group_TG = _top(best_TG2[..., 0] + second_TG, topk_group)
    # One extra column takes the -1 of a token with fewer groups than topk_group.
    in_group = torch.zeros(T, n_group + 1, dtype=torch.bool, device=choice_TE.device)
    in_group.scatter_(1, torch.where(group_TG >= 0, group_TG, n_group), True)
    preferred = in_group[:, :-1].repeat_interleave(size, dim=1)
    first_TK = _top(choice_TE.masked_fill(~preferred, -math.inf), k)
    rest_TK = _top(choice_TE.masked_fill(preferred, -math.inf), k)
    found_T1 = (first_TK >= 0).sum(-1, keepdim=True)
    place_K = torch.arange(k, device=choice_TE.device)
    return torch.cat([first_TK, rest_TK], dim=1).gather(1, place_K + (place_K >= found_T1) * (k - found_T1))


def _place(slots_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows_TK, tokens_R, places_R, offsets_B1): the real places sorted by slot, token, choice; -1 past the last."""
    slots_R = slots_TK.flatten()
    R, device = slots_R.numel(), slots_R.device
    key_R = torch.where(slots_R >= 0, slots_R, num_slots)
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, key_R, torch.ones_like(key_R))
    offsets_B1 = torch.zeros_like(counts)
    torch.cumsum(counts[:-1], dim=0, out=offsets_B1[1:])
    order_R = key_R.argsort(stable=True)
    row_R = torch.arange(R, device=device)
    real_R = row_R < offsets_B1[-1]
    rows_R = torch.empty_like(order_R).scatter_(0, order_R, torch.where(real_R, row_R, -1))
    places_R = torch.where(real_R, order_R, -1)
    tokens_R = torch.where(real_R, order_R // max(slots_TK.shape[1], 1), -1)
    return rows_R.view_as(slots_TK), tokens_R, places_R, offsets_B1


def _slots(experts_TK: Tensor, table_CE: Tensor, client_T: Tensor | None) -> Tensor:
    """The slot of each chosen expert; -1 for expert -1 and for absent experts."""
    expert_TK = experts_TK.clamp(min=0)
    slots_TK = table_CE[0][expert_TK] if client_T is None else table_CE[client_T[:, None], expert_TK]
    return slots_TK.masked_fill(experts_TK < 0, -1)


def _statistics(
    logits_TE: Tensor, hits_TK: Tensor, valid_T: Tensor | None, client_T: Tensor | None, C: int
) -> tuple[Tensor, Tensor]:
    """(C, 4, E) hits, sum of G, max of G, sum of G log G, and (C,) tokens; G = softmax of all logits.

    Added in token order on the CPU. On a GPU the sums of a cohort (index_add_) come in no fixed order.
    """
    T, E = logits_TE.shape
    counted_T = (logits_TE > -math.inf).any(dim=-1)
    counted_T = counted_T if valid_T is None else counted_T & valid_T
    prob_TE = logits_TE.softmax(dim=-1).masked_fill(~counted_T[:, None], 0.0)
    row_T = torch.zeros(T, dtype=torch.int64, device=logits_TE.device) if client_T is None else client_T
    tokens_C = torch.zeros(C, dtype=torch.float64, device=logits_TE.device)
    tokens_C.index_add_(0, row_T, counted_T.double())
    sums_4CE = torch.zeros(4, C, E, dtype=torch.float64, device=logits_TE.device)
    hits, prob_sum, prob_max, plogp_sum = sums_4CE
    hit_TK = (hits_TK >= 0) & counted_T[:, None]
    hits.view(-1).scatter_add_(0, (row_T[:, None] * E + hits_TK.clamp(min=0)).view(-1), hit_TK.double().view(-1))
    if C == 1:
        torch.sum(prob_TE, 0, keepdim=True, dtype=torch.float64, out=prob_sum)
        torch.sum(torch.xlogy(prob_TE, prob_TE), 0, keepdim=True, dtype=torch.float64, out=plogp_sum)
        if T > 0:
            prob_max.copy_(prob_TE.amax(dim=0, keepdim=True))
    else:
        prob_TE = prob_TE.double()
        prob_sum.index_add_(0, row_T, prob_TE)
        plogp_sum.index_add_(0, row_T, torch.xlogy(prob_TE, prob_TE))
        prob_max.scatter_reduce_(0, row_T[:, None].expand(T, E), prob_TE, "amax")
    return sums_4CE.transpose(0, 1).contiguous(), tokens_C


def _refusal(T: int, k: int, logits_TE: Tensor | None = None) -> str | None:
    """Why the kernels do not serve a call, or None."""
    if not 1 <= k <= MOST_CHOICES:
        return f"k={k} is outside the 1..{MOST_CHOICES} choices per token of the kernels; choose a k in that range"
    if T > MOST_TOKENS:
        return f"the call has {T} tokens; the kernels serve up to {MOST_TOKENS}, split the batch"
    if logits_TE is None:
        return None
    if logits_TE.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"logits_TE is {logits_TE.dtype}; the kernels compute in float32, convert it"
    if logits_TE.shape[1] > MOST_EXPERTS:
        return f"logits_TE has {logits_TE.shape[1]} experts; the kernels serve up to {MOST_EXPERTS}"
    return None


def _check_clients(client_T: Tensor | None, C: int) -> None:
    """Free on the CPU; on a GPU the check would wait for the device, so there the range is the caller's promise."""
    if client_T is None or client_T.device.type != "cpu" or client_T.numel() == 0:
        return
    low, high = int(client_T.min()), int(client_T.max())
    if low < 0 or high >= C:
        raise ValueError(f"client_T holds {low if low < 0 else high}; every client must lie in 0..{C - 1}")


def _route(
    logits_TE: Tensor,
    table_CE: Tensor,
    client_T: Tensor | None,
    valid_T: Tensor | None,
    bias_E: Tensor | None,
    num_slots: int,
    k: int,
    scoring: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    scale: float,
    with_stats: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route validated logits.

    Returns:
        weights_TK, experts_TK, slots_TK, rows_TK, tokens_R, places_R, offsets_B1 as in `Routing`; then the sums
        (C, 4, E) and the token counts (C,) of `_statistics`, both with C = 0 unless `with_stats`.
    """
    C, E = table_CE.shape
    _check_clients(client_T, C)
    if use_triton(backend, logits_TE.device, _refusal(logits_TE.shape[0], k, logits_TE), verb="route"):
        from fedmoe_kernels.gpu.routing import driver as gpu

        rule = gpu.Rule(k, scoring, renormalize, n_group, topk_group, scale)
        who = gpu.Holders(table_CE, client_T, valid_T)
        return gpu.route(logits_TE, who, bias_E, rule, num_slots=num_slots, with_stats=with_stats)
    full_TE = _finite(logits_TE)
    # As many slots as (client, expert) pairs: nothing is absent, and the mask and the second choice fall away.
    whole = num_slots == C * E
    held_TE = full_TE if whole else _hide_absent(full_TE, table_CE, client_T)
    if valid_T is not None:
        held_TE = held_TE.masked_fill(~valid_T[:, None], -math.inf)
    experts_TK = _choose(held_TE, k, scoring, bias_E, (n_group, topk_group))
    weights_TK = _weights(held_TE, experts_TK, scoring, renormalize) * scale
    slots_TK = _slots(experts_TK, table_CE, client_T)
    if with_stats:
        hits_TK = experts_TK if whole else _choose(full_TE, k, scoring, bias_E, (n_group, topk_group))
        stats_C4E, tokens_C = _statistics(full_TE, hits_TK, valid_T, client_T, C)
    else:
        stats_C4E = torch.empty(0, 4, E, dtype=torch.float64, device=logits_TE.device)
        tokens_C = torch.empty(0, dtype=torch.float64, device=logits_TE.device)
    return weights_TK, experts_TK, slots_TK, *_place(slots_TK, num_slots), stats_C4E, tokens_C


def _weights(held_TE: Tensor, experts_TK: Tensor, scoring: str, renormalize: bool) -> Tensor:
    """The weights of the chosen places before the scale; 0 where nothing was chosen."""
    chosen, expert_TK = experts_TK >= 0, experts_TK.clamp(min=0)
    if scoring == "softmax" and not renormalize:
        return held_TE.softmax(dim=-1).gather(1, expert_TK).masked_fill(~chosen, 0.0)
    logit_TK = held_TE.gather(1, expert_TK)
    if scoring == "sigmoid":
        score_TK = _sigmoid(logit_TK).masked_fill(~chosen, 0.0)
        return score_TK / (score_TK.sum(-1, keepdim=True) + SIGMOID_EPS) if renormalize else score_TK
    # Softmax over all permitted, divided by the sum of the chosen, is softmax over the chosen: no underflow, no E.
    return logit_TK.masked_fill(~chosen, -math.inf).softmax(dim=-1).masked_fill(~chosen, 0.0)


def _route_backward(
    grad_TK: Tensor,
    logits_TE: Tensor,
    experts_TK: Tensor,
    table_CE: Tensor,
    client_T: Tensor | None,
    scoring: str,
    renormalize: bool,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Compute dL/dlogits (T, E) from dL/dweights (T, K); 0 at non-finite logits and for tokens without a row.

    With q a softmax over the competing logits and g = scale * grad: dl = q * (g - <g, q>), where the competitors are
    the chosen experts, or all permitted ones for "softmax" that is not renormalised. Sigmoid, w = s / (sum s + eps):
    dl = s * (1 - s) * (g - <g, w>) / (sum s + eps).
    """
    T, k = experts_TK.shape
    if use_triton(backend, logits_TE.device, _refusal(T, k, logits_TE), verb="route"):
        from fedmoe_kernels.gpu.routing import driver as gpu

        rule = gpu.Rule(k, scoring, renormalize, scale=scale)
        return gpu.route_backward(grad_TK, logits_TE, experts_TK, gpu.Holders(table_CE, client_T, None), rule)
    held_TE = _hide_absent(_finite(logits_TE), table_CE, client_T)
    chosen, expert_TK = experts_TK >= 0, experts_TK.clamp(min=0)
    grad_TK = (grad_TK.to(held_TE.dtype) * scale).masked_fill(~chosen, 0.0)
    if scoring == "softmax" and not renormalize:
        prob_TE = held_TE.softmax(dim=-1).masked_fill(~chosen.any(dim=-1, keepdim=True), 0.0)
        pulled = (grad_TK * prob_TE.gather(1, expert_TK)).sum(-1, keepdim=True)
        grad_TE = prob_TE * (torch.zeros_like(held_TE).scatter_add_(1, expert_TK, grad_TK) - pulled)
    else:
        logit_TK = held_TE.gather(1, expert_TK)
        if scoring == "sigmoid":
            score_TK = _sigmoid(logit_TK).masked_fill(~chosen, 0.0)
            if renormalize:
                total_T1 = score_TK.sum(-1, keepdim=True) + SIGMOID_EPS
                pulled = (grad_TK * score_TK / total_T1).sum(-1, keepdim=True)
                slope_TK = score_TK / total_T1 * (1 - score_TK) * (grad_TK - pulled)
            else:
                slope_TK = score_TK * (1 - score_TK) * grad_TK
        else:
            q_TK = logit_TK.masked_fill(~chosen, -math.inf).softmax(dim=-1).masked_fill(~chosen, 0.0)
            slope_TK = q_TK * (grad_TK - (grad_TK * q_TK).sum(-1, keepdim=True))
        grad_TE = torch.zeros_like(held_TE).scatter_add_(1, expert_TK, slope_TK)
    return grad_TE.masked_fill(~logits_TE.isfinite(), 0.0).to(logits_TE.dtype)


def _place_rows(
    experts_TK: Tensor,
    table_CE: Tensor,
    client_T: Tensor | None,
    valid_T: Tensor | None,
    num_slots: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Place choices that were made elsewhere: experts_TK, slots_TK, rows_TK, tokens_R, places_R, offsets_B1."""
    _check_clients(client_T, table_CE.shape[0])
    if use_triton(backend, experts_TK.device, _refusal(*experts_TK.shape), verb="Routing.from_topk"):
        from fedmoe_kernels.gpu.routing import driver as gpu

        return gpu.place(experts_TK, gpu.Holders(table_CE, client_T, valid_T), num_slots=num_slots)
    here = (experts_TK >= 0) & (experts_TK < table_CE.shape[1])
    here = here if valid_T is None else here & valid_T[:, None]
    slots_TK = _slots(torch.where(here, experts_TK.long(), -1), table_CE, client_T)
    return torch.where(slots_TK >= 0, experts_TK.long(), -1), slots_TK, *_place(slots_TK, num_slots)


route_op = torch.library.custom_op("fedmoe::route", _route, mutates_args=())
route_backward_op = torch.library.custom_op("fedmoe::route_backward", _route_backward, mutates_args=())
place_rows_op = torch.library.custom_op("fedmoe::place_rows", _place_rows, mutates_args=())


def _fake_places(like_TK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return like_TK.new_empty(shape, dtype=torch.int64)

    T, K = like_TK.shape
    return new(T, K), new(T, K), new(T, K), new(T * K), new(T * K), new(num_slots + 1)


# The fakes name only what decides a shape. The others come in the bodies' order, a last one that is its default not at
# all.
@route_op.register_fake
def _(logits_TE: Tensor, table_CE: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (T, E), num_slots, k, with_stats = logits_TE.shape, rest[3], rest[4], rest[10]
    C = table_CE.shape[0] if with_stats else 0
    weights_TK = logits_TE.new_empty(T, k, dtype=compute_dtype(logits_TE.dtype))
    stats_C4E = logits_TE.new_empty(C, 4, E, dtype=torch.float64)
    return weights_TK, *_fake_places(weights_TK, num_slots), stats_C4E, stats_C4E.new_empty(C)


@route_backward_op.register_fake
def _(_grad_TK: Tensor, logits_TE: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


@place_rows_op.register_fake
def _(experts_TK: Tensor, _table_CE: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_places(experts_TK, rest[2])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    logits_TE, table_CE, client_T = inputs[:3]
    ctx.save_for_backward(logits_TE, output[1], table_CE, client_T)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.rule = (inputs[7], inputs[8], inputs[11], inputs[13])  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, _needs: Sequence[bool], grad_TK: Tensor | None, *_: Tensor | None
) -> tuple:
    if grad_TK is None:
        return (None,) * 14
    logits_TE, experts_TK, table_CE, client_T = ctx.saved_tensors  # type: ignore[attr-defined]
    rule = ctx.rule  # type: ignore[attr-defined]
    grad_TE = route_backward(grad_TK, logits_TE, experts_TK, table_CE, client_T, *rule)
    return grad_TE, *(None,) * 13


route_op.register_autograd(
    lambda ctx, *gradients: _backward(ctx, ctx.needs_input_grad, *gradients), setup_context=_save
)


route_backward = Operator(route_backward_op, _route_backward, transformed=last_derivative("route"))
place_rows = Operator(place_rows_op, _place_rows)
route = Operator(
    route_op,
    _route,
    function_of("Route", _route, _save, _backward),
    transformed_of("RouteTransformed", _save, _backward),
)
