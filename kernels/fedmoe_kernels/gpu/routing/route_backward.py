"""The backward of routing in one launch: the gradient of the weights in, the gradient of the logits out."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.launch import Launch, cdiv
from fedmoe_kernels.gpu.routing.choose import Holders, Rule, finite, held, powers, sigmoid, tokens_of_block
from fedmoe_kernels.gpu.routing.route import EPS, shape_args


@triton.jit
def _spread(value, expert, e, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, EP: tl.constexpr):
    """(BT, EP): each choice's value (BT, KP) in the column of its expert, 0 elsewhere."""
    j = tl.arange(0, KP)
    out = tl.zeros((BT, EP), tl.float32)
    for i in range(K):
        column = tl.max(tl.where((j == i)[None, :], expert, -1), 1)
        here = tl.sum(tl.where((j == i)[None, :], value, 0.0), 1)
        out = tl.where(e[None, :] == column[:, None], here[:, None], out)
    return out


@triton.jit(do_not_specialize=["tokens", "clients"])
def _route_backward_kernel(
    grad, logits, experts, table, client, valid, out, tokens, clients, scale,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_CLIENT: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Formulas as in `routing.ops.route_backward_op`; 0 at logits that are not finite and for tokens without a row.

    Only softmax that is not renormalised reads all logits of a token; the other rules read the chosen ones.
    """
    block = tl.program_id(0)
    t, inside, _live, owner = tokens_of_block(client, valid, block, tokens, clients, BT, HAS_CLIENT, HAS_VALID)
    e, j = tl.arange(0, EP), tl.arange(0, KP)
    at = t[:, None] * K + j[None, :]
    real = inside[:, None] & (j < K)[None, :]
    expert = tl.load(experts + at, mask=real, other=-1).to(tl.int32)
    chosen = expert >= 0
    g = tl.load(grad + at, mask=chosen, other=0.0).to(tl.float32) * scale
    raw = tl.load(logits + t[:, None] * E + expert, mask=chosen, other=0.0).to(tl.float32)
    logit = finite(raw)
    written = inside[:, None] & (e < E)[None, :]
    if SCORING == "softmax" and not RENORMALIZE:
        raw_all = tl.load(logits + t[:, None] * E + e[None, :], mask=written, other=-float("inf")).to(tl.float32)
        x = held(finite(raw_all), table, owner, e, E, HAS_CLIENT)
        power, best, total = powers(x, x > -float("inf"))
        q = tl.where(chosen, tl.exp(logit - best[:, None]) / total[:, None], 0.0)
        pulled = tl.sum(g * q, 1)
        slope = power / total[:, None] * (_spread(g, expert, e, K, KP, BT, EP) - pulled[:, None])
        some = tl.max(chosen.to(tl.int32), 1) > 0
        slope = tl.where(some[:, None] & (tl.abs(raw_all) < float("inf")), slope, 0.0)
    else:
        if SCORING == "sigmoid":
            score = tl.where(chosen, sigmoid(logit), 0.0)
            if RENORMALIZE:
                part = score / (tl.sum(score, 1) + EPS)[:, None]
                each = part * (1.0 - score) * (g - tl.sum(g * part, 1)[:, None])
            else:
                each = score * (1.0 - score) * g
        else:
            power, _best, total = powers(logit, chosen)
            part = power / total[:, None]
            each = part * (g - tl.sum(g * part, 1)[:, None])
        slope = _spread(tl.where(tl.abs(raw) < float("inf"), each, 0.0), expert, e, K, KP, BT, EP)
    tl.store(out + t[:, None] * E + e[None, :], slope, mask=written)


def route_backward(
    grad_TK: Tensor, logits_TE: Tensor, experts_TK: Tensor, holders: Holders, rule: Rule, *, out_TE: Tensor
) -> list[Launch]:
    """Fill out_TE, of the logits' dtype, from the gradient of the weights and the choices made; all contiguous."""
    T, E = logits_TE.shape
    sizes = shape_args(E, rule, logits=2048)  # 128 registers at most; with 4096 239
    args = {
        "grad": grad_TK,
        "logits": logits_TE,
        "experts": experts_TK,
        **holders.args(logits_TE),
        "out": out_TE,
        "tokens": T,
        "scale": rule.scale,
        **{name: sizes[name] for name in ("E", "EP", "K", "KP", "BT")},
        "SCORING": rule.scoring,
        "RENORMALIZE": rule.renormalize,
    }
    reads = E if rule.scoring == "softmax" and not rule.renormalize else rule.k
    moved = T * (E + reads) * logits_TE.element_size() + T * rule.k * 12
    warps = 4 if E <= 2048 else 8
    return [Launch(_route_backward_kernel, (cdiv(T, sizes["BT"]),), args, warps, 1, bytes=moved)]
