"""Router statistics: sums over each client's tokens, exact and therefore in any order the same bits.

Every term is rounded to a fixed-point number and added as an integer, so that neither the blocks' bounds nor other
clients' tokens can change a sum. Shapes: C clients, S splits of the tokens, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.launch import Launch, cdiv
from fedmoe_kernels.gpu.routing.choose import Holders, Rule, choose, finite, powers, tokens_of_block
from fedmoe_kernels.gpu.routing.route import shape_args

# One term is at most 1 (a probability p) or 1 / e (-p log p), and a call has at most 2^24 tokens (`routing_ops` sees to
# it): a sum stays below 2^38 * 2^24 = 2^62. A term is rounded by at most 2^-39 = 1.8e-12; the float32 softmax under it
# is off by about 1e-7 of itself, or 1e-6 for logits 20 below the largest.
ONE = tl.constexpr(2.0**38)
UNIT = tl.constexpr(2.0**-38)


@triton.jit
def _finish(stats, row, e, inside, hits, prob, most, plogp, E: tl.constexpr):
    """Write one client's hits, sum of G, max of G and sum of G log G (kept with the sign reversed) as float64."""
    at = stats + row * 4 * E + e
    tl.store(at, hits.to(tl.float64), mask=inside)
    tl.store(at + E, prob.to(tl.float64) * UNIT, mask=inside)
    tl.store(at + 2 * E, most.to(tl.float64), mask=inside)
    tl.store(at + 3 * E, 0.0 - plogp.to(tl.float64) * UNIT, mask=inside)


@triton.jit(do_not_specialize=["tokens", "clients", "splits"])
def _stats_kernel(
    logits, experts, table, client, valid, bias, parts, part_tokens, stats, stat_tokens, tokens, clients, splits,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    SIGMOID: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, GP: tl.constexpr,
    WHOLE: tl.constexpr, LAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CLIENT: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One program: the tokens of one client in every splits-th block. WHOLE: no expert is absent, so that the hits are
    the choices already made. LAST: there is one split, whose sums are the result."""
    c, split = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, EP)
    hits = tl.zeros((EP,), tl.int32)
    prob = tl.zeros((EP,), tl.int64)
    plogp = tl.zeros((EP,), tl.int64)
    most = tl.zeros((EP,), tl.float32)
    number = tl.zeros((), tl.int32)
    for block in range(split, tl.cdiv(tokens, BT), splits):
        t, _inside, live, owner = tokens_of_block(client, valid, block, tokens, clients, BT, HAS_CLIENT, HAS_VALID)
        live = live & (owner == c)
        # A block without a token of this client costs only the look at client_T; its logits are not loaded.
        if tl.max(live.to(tl.int32), 0) > 0:
            if WHOLE:
                taken = tl.zeros((BT, EP), tl.int32)
                for j in range(K):
                    expert = tl.load(experts + t * K + j, mask=live, other=-1).to(tl.int32)
                    taken += (e[None, :] == expert[:, None]).to(tl.int32)
                hits += tl.sum(taken, 0)
            mask = live[:, None] & (e < E)[None, :]
            x = finite(tl.load(logits + t[:, None] * E + e[None, :], mask=mask, other=-float("inf")))
            some = x > -float("inf")
            counted = tl.max(some.to(tl.int32), 1)
            power, best, total = powers(x, some)
            p = power / total[:, None]
            log_p = tl.where(p > 0.0, x - best[:, None] - tl.log(total)[:, None], 0.0)
            prob += tl.sum((p * ONE + 0.5).to(tl.int64), 0)
            plogp += tl.sum((tl.maximum(0.0 - p * log_p, 0.0) * ONE + 0.5).to(tl.int64), 0)
            most = tl.maximum(most, tl.max(p, 0))
            if not WHOLE:
                _picked, taken = choose(x, bias, e, K, KP, BT, E, EP, SIGMOID, HAS_BIAS, N_GROUP, TOPK_GROUP, GP)
                hits += tl.sum(taken.to(tl.int32), 0)
            number += tl.sum(counted, 0)
    row = c.to(tl.int64)
    if LAST:
        _finish(stats, row, e, e < E, hits, prob, most, plogp, E)
        tl.store(stat_tokens + row, number.to(tl.float64))
    else:
        row = row * splits + split
        at = parts + row * 4 * E + e
        tl.store(at, hits.to(tl.int64), mask=e < E)
        tl.store(at + E, prob, mask=e < E)
        # The bits of floats that are not negative are ordered as the floats are.
        tl.store(at + 2 * E, most.to(tl.int32, bitcast=True).to(tl.int64), mask=e < E)
        tl.store(at + 3 * E, plogp, mask=e < E)
        tl.store(part_tokens + row, number.to(tl.int64))


@triton.jit(do_not_specialize=["splits"])
def _sum_kernel(parts, part_tokens, stats, stat_tokens, splits, E: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr):
    """One program adds up the splits of one client for BE experts."""
    c = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    hits = tl.zeros((BE,), tl.int64)
    prob = tl.zeros((BE,), tl.int64)
    most = tl.zeros((BE,), tl.int64)
    plogp = tl.zeros((BE,), tl.int64)
    number = tl.zeros((), tl.int64)
    for s0 in range(0, splits, BS):
        s = s0 + tl.arange(0, BS)
        at = parts + (c * splits + s)[:, None] * 4 * E + e[None, :]
        inside = (s < splits)[:, None] & (e < E)[None, :]
        hits += tl.sum(tl.load(at, mask=inside, other=0), 0)
        prob += tl.sum(tl.load(at + E, mask=inside, other=0), 0)
        most = tl.maximum(most, tl.max(tl.load(at + 2 * E, mask=inside, other=0), 0))
        plogp += tl.sum(tl.load(at + 3 * E, mask=inside, other=0), 0)
        number += tl.sum(tl.load(part_tokens + c * splits + s, mask=s < splits, other=0), 0)
    _finish(stats, c, e, e < E, hits, prob, most.to(tl.int32).to(tl.float32, bitcast=True), plogp, E)
    if tl.program_id(1) == 0:
        tl.store(stat_tokens + c, number.to(tl.float64))


def _sizes(num_experts: int, rule: Rule) -> dict[str, int]:
    """Choose blocks of 512 logits, because three sums of 64 bits lie next to them."""
    return shape_args(num_experts, rule, logits=512)


def splits_for(tokens: int, clients: int, num_experts: int, rule: Rule) -> int:
    """Choose how many programs share one client's tokens: 8 blocks each, about 1024 programs at most.

    It may depend on the cohort, because exact sums do not depend on it.
    """
    blocks = cdiv(tokens, _sizes(num_experts, rule)["BT"])
    return max(1, min(cdiv(blocks, 8), cdiv(1024, clients)))


def route_stats(
    logits_TE: Tensor,
    experts_TK: Tensor,
    holders: Holders,
    bias_E: Tensor | None,
    rule: Rule,
    *,
    whole: bool,
    parts_CS4E: Tensor,
    part_tokens_CS: Tensor,
    stats_C4E: Tensor,
    tokens_C: Tensor,
) -> list[Launch]:
    """Fill stats_C4E and tokens_C, float64: hits, sum of G, max of G, sum of G log G, as `RouterStats` defines them.

    Args:
        experts_TK: what `route` chose; read only if `whole`, which says that no expert is absent.
        parts_CS4E, part_tokens_CS: int64 scratch; S = 1 needs one launch, more need two.
    """
    T, E = logits_TE.shape
    clients, splits = part_tokens_CS.shape
    args = {
        "logits": logits_TE,
        "experts": experts_TK,
        **holders.args(logits_TE),
        "bias": logits_TE if bias_E is None else bias_E,
        "parts": parts_CS4E,
        "part_tokens": part_tokens_CS,
        "stats": stats_C4E,
        "stat_tokens": tokens_C,
        "tokens": T,
        "splits": splits,
        **_sizes(E, rule),
        "SIGMOID": rule.scoring == "sigmoid",
        "WHOLE": whole,
        "LAST": splits == 1,
        "HAS_BIAS": bias_E is not None,
    }
    moved = T * E * logits_TE.element_size() + parts_CS4E.numel() * 8
    warps = max(4, args["EP"] // 256)
    # Told how many registers there are, the compiler keeps the sums in them; else it spills two to run more programs.
    registers = min(255, 65536 // (32 * warps))
    launches = [Launch(_stats_kernel, (clients, splits), args, warps, 1, bytes=moved, registers=registers)]
    if splits > 1:
        sums = {"parts": parts_CS4E, "part_tokens": part_tokens_CS, "stats": stats_C4E, "stat_tokens": tokens_C}
        sizes = {"splits": splits, "E": E, "BE": 32, "BS": 16}
        grid = (clients, cdiv(E, 32))
        launches.append(Launch(_sum_kernel, grid, {**sums, **sizes}, 4, 1, bytes=parts_CS4E.numel() * 8))
    return launches
