"""The routing kernel: logits in; chosen experts, slots and weights out, with the rows of each slot counted by block."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.launch import Launch, cdiv, power_of_2
from fedmoe_kernels.gpu.routing.choose import (
    Holders,
    Rule,
    block_tokens,
    choose,
    finite,
    held,
    powers,
    sigmoid,
    tokens_of_block,
)
from fedmoe_kernels.gpu.routing.place import Chosen, count
from fedmoe_kernels.routing.rules import SIGMOID_EPS

EPS = tl.constexpr(SIGMOID_EPS)


@triton.jit(do_not_specialize=["tokens", "clients", "num_slots"])
def _route_kernel(
    logits, table, client, valid, bias, weights, experts, slots, counts, tokens, clients, num_slots, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr,
    GP: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CLIENT: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program routes BT tokens; WHOLE: no expert is absent anywhere, so that the mask falls away."""
    SIGMOID: tl.constexpr = SCORING == "sigmoid"
    DENSE: tl.constexpr = SCORING == "softmax" and not RENORMALIZE
    block = tl.program_id(0)
    t, inside, live, owner = tokens_of_block(client, valid, block, tokens, clients, BT, HAS_CLIENT, HAS_VALID)
    e = tl.arange(0, EP)
    places = logits + t[:, None] * E + e[None, :]
    x = finite(tl.load(places, mask=live[:, None] & (e < E)[None, :], other=-float("inf")))
    if not WHOLE:
        x = held(x, table, owner, e, E, HAS_CLIENT)
    if DENSE:
        # Before the choice, so that no logit has to outlive it in a register.
        _power, best, total = powers(x, x > -float("inf"))
    picked, _taken = choose(x, bias, e, K, KP, BT, E, EP, SIGMOID, HAS_BIAS, N_GROUP, TOPK_GROUP, GP)

    chosen = picked >= 0
    slot = tl.load(table + owner[:, None] * E + picked, mask=chosen, other=-1)
    logit = finite(tl.load(logits + t[:, None] * E + picked, mask=chosen, other=0.0))
    if SIGMOID:
        power = tl.where(chosen, sigmoid(logit), 0.0)
        weight = power
        if RENORMALIZE:
            weight = power / (tl.sum(power, 1) + EPS)[:, None]
    elif DENSE:
        weight = tl.where(chosen, tl.exp(logit - best[:, None]) / total[:, None], 0.0)
    else:
        # Softmax over all permitted, divided by the sum of the chosen, is softmax over the chosen: no underflow.
        power, _best, total = powers(logit, chosen)
        weight = power / total[:, None]

    j = tl.arange(0, KP)
    written = inside[:, None] & (j < K)[None, :]
    at = t[:, None] * K + j[None, :]
    tl.store(weights + at, weight * scale, mask=written)
    tl.store(experts + at, picked.to(tl.int64), mask=written)
    tl.store(slots + at, slot, mask=written)
    count(tl.reshape(slot, [BT * KP]).to(tl.int32), counts, block, num_slots)


def route(
    logits_TE: Tensor, holders: Holders, bias_E: Tensor | None, rule: Rule, *, weights_TK: Tensor, chosen: Chosen
) -> list[Launch]:
    """Fill weights_TK, float32, and `chosen`.

    Args:
        logits_TE: contiguous bfloat16, float16 or float32.
        holders: the slot table and the tokens' clients and padding.
        bias_E: added to the sigmoid for the choice.
        rule: what to choose and how to weight it.
    """
    T, E = logits_TE.shape
    sizes, places = shape_args(E, rule), chosen.args()
    args = {
        "logits": logits_TE,
        **holders.args(logits_TE),
        "bias": logits_TE if bias_E is None else bias_E,
        "weights": weights_TK,
        **places,
        "tokens": T,
        "scale": rule.scale,
        **sizes,
        "SCORING": rule.scoring,
        "RENORMALIZE": rule.renormalize,
        "WHOLE": places["num_slots"] == holders.table_CE.numel(),
        "HAS_BIAS": bias_E is not None,
    }
    moved = T * E * logits_TE.element_size() + T * rule.k * 20 + chosen.counts_XB.numel() * 4
    return [Launch(_route_kernel, (cdiv(T, sizes["BT"]),), args, 8, 1, bytes=moved)]


def shape_args(num_experts: int, rule: Rule, logits: int = 4096) -> dict[str, int]:
    """Return the sizes of a routing kernel's blocks of so many logits, and its groups."""
    return {
        "E": num_experts,
        "EP": power_of_2(num_experts),
        "K": rule.k,
        "KP": power_of_2(rule.k),
        "BT": block_tokens(rule.k, num_experts, logits),
        "N_GROUP": rule.n_group,
        "TOPK_GROUP": rule.topk_group,
        "GP": power_of_2(rule.n_group),
    }
