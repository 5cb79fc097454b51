"""What the routing kernels share: a block of tokens, their logits made finite, and the k best experts of each.

Blocks are (tokens, experts) with the experts' axis padded to a power of two; everything stays in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.launch import power_of_2

LARGEST = tl.constexpr(3.4028234663852886e38)  # the largest finite float32


class Rule(NamedTuple):
    """How experts are chosen and weighted, as in `routing.route`; n_group = 1 stands for no groups."""

    k: int
    scoring: str
    renormalize: bool
    n_group: int = 1
    topk_group: int = 1
    scale: float = 1.0


class Holders(NamedTuple):
    """Which client owns each token, and what it holds: table_CE (C, E), client_T (T,) and valid_T (T,)."""

    table_CE: Tensor
    client_T: Tensor | None
    valid_T: Tensor | None

    @property
    def contiguous(self) -> Holders:
        """The same as the kernels read them."""
        return Holders._make(None if tensor is None else tensor.contiguous() for tensor in self)

    def args(self, stand_in: Tensor) -> dict[str, Any]:
        """Return the kernel arguments; `stand_in` is passed, and never read, for what is not given."""
        return {
            "table": self.table_CE,
            "client": stand_in if self.client_T is None else self.client_T,
            "valid": stand_in if self.valid_T is None else self.valid_T,
            "clients": self.table_CE.shape[0],
            "HAS_CLIENT": self.client_T is not None,
            "HAS_VALID": self.valid_T is not None,
        }


def block_tokens(k: int, num_experts: int = 1, logits: int = 4096) -> int:
    """Return the tokens of a block: at most 256 places and so many logits (4096 are 32 registers a thread in 4 warps).

    A function of E and k alone: the order in which a token's logits are summed follows from the block's shape, and it
    must not depend on how many tokens others bring.
    """
    return max(1, min(logits // power_of_2(num_experts), 256 // power_of_2(k)))


@triton.jit
def tokens_of_block(client, valid, block, tokens, clients, BT: tl.constexpr, HAS_CLIENT: tl.constexpr,
                    HAS_VALID: tl.constexpr):  # fmt: skip
    """(token ids (BT,) int64, inside, live, owner): live tokens are neither padding nor of a client that is unknown."""
    t = tl.full((BT,), BT, tl.int64) * block + tl.arange(0, BT)
    inside = t < tokens
    live = inside
    owner = tl.zeros((BT,), tl.int64)
    if HAS_VALID:
        live = live & (tl.load(valid + t, mask=inside, other=0) != 0)
    if HAS_CLIENT:
        owner = tl.load(client + t, mask=live, other=0)
        live = live & (owner >= 0) & (owner < clients)
        owner = tl.where(live, owner, 0)
    return t, inside, live, owner


@triton.jit
def finite(x):
    """Logits in float32, in [-inf, max]: NaN becomes -inf (never chosen), +inf the largest finite number."""
    x = x.to(tl.float32)
    return tl.minimum(tl.where(x == x, x, -float("inf")), LARGEST)


@triton.jit
def held(x, table, owner, e, E: tl.constexpr, HAS_CLIENT: tl.constexpr):
    """-inf where the token's client does not hold the expert."""
    if HAS_CLIENT:
        slot = tl.load(table + owner[:, None] * E + e[None, :], mask=(e < E)[None, :], other=-1)
        return tl.where(slot >= 0, x, -float("inf"))
    else:
        slot = tl.load(table + e, mask=e < E, other=-1)
        return tl.where((slot >= 0)[None, :], x, -float("inf"))


@triton.jit
def sigmoid(x):
    """As the other bodies compute it; equal logits give equal bits, so that ties are ties."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def powers(x, live):
    """(exp(x - max), 0 where not live; max; sum) of each row's live places; max 0 and sum 1 for a row without any."""
    best = tl.max(tl.where(live, x, -float("inf")), 1)
    best = tl.where(best > -float("inf"), best, 0.0)
    power = tl.exp(tl.where(live, x - best[:, None], -float("inf")))
    total = tl.sum(power, 1)
    return power, best, tl.where(total > 0.0, total, 1.0)


@triton.jit
def _first(x, ids, NONE: tl.constexpr):
    """(maximum, its lowest id, -1 if the maximum is -inf) along each row."""
    best = tl.max(x, 1)
    first = tl.min(tl.where(x == best[:, None], ids[None, :], NONE), 1)
    return best, tl.where(best > -float("inf"), first, -1)


@triton.jit
def _preferred(choice, e, BT: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, N_GROUP: tl.constexpr,
               TOPK_GROUP: tl.constexpr, GP: tl.constexpr):  # fmt: skip
    """Whether an expert lies in one of the best groups: a group's score is the sum of its two best choice scores."""
    group = e // (E // N_GROUP)
    ids = tl.arange(0, GP)
    score = tl.full((BT, GP), -float("inf"), tl.float32)
    for g in range(N_GROUP):
        members = tl.where((group == g)[None, :], choice, -float("inf"))
        best, first = _first(members, e, EP)
        second = tl.max(tl.where(e[None, :] == first[:, None], -float("inf"), members), 1)
        both = best + tl.where(second > -float("inf"), second, 0.0)
        score = tl.where((ids == g)[None, :], both[:, None], score)
    inside = tl.zeros((BT, EP), tl.int32)
    for _ in range(TOPK_GROUP):
        _best, first = _first(score, ids, GP)
        inside = tl.where(group[None, :] == first[:, None], 1, inside)
        score = tl.where(ids[None, :] == first[:, None], -float("inf"), score)
    return inside > 0


@triton.jit
def choose(
    x, bias, e,
    K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """(picked (BT, KP) int32, best first, -1 where nothing is left; taken (BT, EP)) from logits x in [-inf, max].

    k passes of max, ties by the lowest id: two reductions a pass over what lies in registers.
    """
    choice = x
    if SIGMOID:
        choice = sigmoid(x)
        if HAS_BIAS:
            choice += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        # A bias of NaN or -inf makes an expert that is never chosen, like a logit of NaN or -inf.
        choice = tl.where((x > -float("inf")) & (choice == choice), choice, -float("inf"))
    preferred = choice
    if N_GROUP > 1:
        preferred = _preferred(choice, e, BT, E, EP, N_GROUP, TOPK_GROUP, GP)
    left = choice
    place = tl.arange(0, KP)
    picked = tl.full((BT, KP), -1, tl.int32)
    for j in range(K):
        open_ = left
        if N_GROUP > 1:
            # Only when the preferred groups have nothing left are the others asked.
            inner = tl.where(preferred, left, -float("inf"))
            open_ = tl.where((tl.max(inner, 1) > -float("inf"))[:, None], inner, left)
        _best, first = _first(open_, e, EP)
        picked = tl.where((place == j)[None, :], first[:, None], picked)
        left = tl.where(e[None, :] == first[:, None], -float("inf"), left)
    return picked, choice != left
