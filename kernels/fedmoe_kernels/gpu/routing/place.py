"""Row order by slot: rows counted by block, summed up over blocks and slots, then every place told its row.

No atomics and no host sync. The order is stable, by slot, token and choice, because a place's row is a count of what
comes before it: smaller slots, the same slot in earlier blocks, the same slot earlier in the block.
Shapes: X blocks of `per_block` tokens, B slots, R = T * K places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.launch import Launch, cdiv, power_of_2
from fedmoe_kernels.gpu.routing.choose import Holders, tokens_of_block

# Up to so many counts the programs that place rows add them up themselves, all of them (16 KB each, out of the L2
# cache), which saves the two launches of about 3 us that a scan takes.
FEW_COUNTS = 4096


@triton.jit
def count(slot, counts, block, num_slots):
    """Write how many of a block's places `slot` (P,), -1 = none, belong to each slot.

    By comparison of each place with each slot: 256 comparisons a slot, and no two programs touch one counter.
    """
    for s0 in range(0, num_slots, 32):
        b = s0 + tl.arange(0, 32)
        rows = tl.sum((slot[:, None] == b[None, :]).to(tl.int32), 0)
        tl.store(counts + block.to(tl.int64) * num_slots + b, rows, mask=b < num_slots)


@triton.jit(do_not_specialize=["tokens", "clients", "num_slots"])
def _slots_kernel(
    given, table, client, valid, experts, slots, counts, tokens, clients, num_slots,
    E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    HAS_CLIENT: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """The slots of choices that were made elsewhere; an id outside [0, E) and an absent expert have none."""
    block = tl.program_id(0)
    t, inside, live, owner = tokens_of_block(client, valid, block, tokens, clients, BT, HAS_CLIENT, HAS_VALID)
    j = tl.arange(0, KP)
    written = inside[:, None] & (j < K)[None, :]
    at = t[:, None] * K + j[None, :]
    expert = tl.load(given + at, mask=written, other=-1).to(tl.int64)
    here = live[:, None] & (expert >= 0) & (expert < E)
    slot = tl.load(table + owner[:, None] * E + expert, mask=here, other=-1)
    tl.store(experts + at, tl.where(slot >= 0, expert, -1), mask=written)
    tl.store(slots + at, slot, mask=written)
    count(tl.reshape(slot, [BT * KP]).to(tl.int32), counts, block, num_slots)


@triton.jit(do_not_specialize=["blocks", "num_slots"])
def _scan_kernel(counts, before, totals, blocks, num_slots, BLOCKS: tl.constexpr, SLOTS: tl.constexpr):
    """before[x, b]: rows of slot b in the blocks before x; totals[b]: in all of them. One program for SLOTS slots.

    The sums go to a second buffer, because a thread may still have to read a count that another is done with.
    """
    b = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS,), tl.int32)
    for x0 in range(0, blocks, BLOCKS):
        x = x0 + tl.arange(0, BLOCKS)
        inside = (x < blocks)[:, None] & (b < num_slots)[None, :]
        at = x.to(tl.int64)[:, None] * num_slots + b[None, :]
        rows = tl.load(counts + at, mask=inside, other=0)
        tl.store(before + at, total[None, :] + tl.cumsum(rows, 0) - rows, mask=inside)
        total += tl.sum(rows, 0)
    tl.store(totals + b, total, mask=b < num_slots)


@triton.jit(do_not_specialize=["num_slots"])
def _offsets_kernel(totals, offsets, num_slots, SLOTS: tl.constexpr):
    """One program adds up the totals of all slots."""
    tl.store(offsets, 0)
    base = tl.zeros((), tl.int64)
    for s0 in range(0, num_slots, SLOTS):
        b = s0 + tl.arange(0, SLOTS)
        total = tl.load(totals + b, mask=b < num_slots, other=0).to(tl.int64)
        tl.store(offsets + 1 + b, base + tl.cumsum(total, 0), mask=b < num_slots)
        base += tl.sum(total, 0)


@triton.jit
def _starts(slot, counts, offsets, block, blocks, num_slots, P: tl.constexpr):
    """(first row of the block's places of each place's slot (P,), N) out of all counts; block 0 writes the bounds."""
    start = tl.zeros((P,), tl.int64)
    real = tl.zeros((), tl.int64)
    for s0 in range(0, num_slots, 16):
        b = s0 + tl.arange(0, 16)
        total = tl.zeros((16,), tl.int32)
        before = tl.zeros((16,), tl.int32)
        for x0 in range(0, blocks, 32):
            x = x0 + tl.arange(0, 32)
            inside = (x < blocks)[:, None] & (b < num_slots)[None, :]
            rows = tl.load(counts + x[:, None] * num_slots + b[None, :], mask=inside, other=0)
            total += tl.sum(rows, 0)
            before += tl.sum(tl.where((x < block)[:, None], rows, 0), 0)
        smaller = tl.where(b[None, :] < slot[:, None], total[None, :], 0)
        same = tl.where(b[None, :] == slot[:, None], before[None, :], 0)
        start += tl.sum(smaller + same, 1)
        if block == 0:
            tl.store(offsets + 1 + b, real + tl.cumsum(total, 0), mask=b < num_slots)
        real += tl.sum(total, 0)
    if block == 0:
        tl.store(offsets, 0)
    return start, real


@triton.jit(do_not_specialize=["places", "blocks", "num_slots"])
def _rows_kernel(
    slots, counts, before, offsets, rows, token_of_row, place_of_row, places, blocks, num_slots,
    K: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, STEP: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """One program gives the SIZE places of a block their rows; it also writes -1 to those of its rows from N on.

    FEW: the sums over blocks and slots are made here, not read from `before` and `offsets`.
    """
    block = tl.program_id(0)
    i = tl.arange(0, P)
    first = block.to(tl.int64) * SIZE
    place = first + i
    inside = (i < SIZE) & (place < places)
    slot = tl.load(slots + place, mask=inside, other=-1)
    rank = tl.zeros((P,), tl.int32)
    # A bound that the compiler knows would have it unroll all P / STEP steps, and spill.
    for i0 in range(0, tl.minimum(places - first, SIZE).to(tl.int32), STEP):
        other = i0 + tl.arange(0, STEP)
        theirs = tl.load(slots + first + other, mask=(other < SIZE) & (first + other < places), other=-1)
        rank += tl.sum(((theirs[None, :] == slot[:, None]) & (other[None, :] < i[:, None])).to(tl.int32), 1)
    taken = slot >= 0
    if FEW:
        start, real = _starts(slot.to(tl.int32), counts, offsets, block, blocks, num_slots, P)
    else:
        start = tl.load(offsets + slot, mask=taken, other=0)
        start += tl.load(before + block.to(tl.int64) * num_slots + slot, mask=taken, other=0)
        real = tl.load(offsets + num_slots)
    row = tl.where(taken, start + rank, -1)
    tl.store(rows + place, row, mask=inside)
    tl.store(token_of_row + row, place // K, mask=taken)
    tl.store(place_of_row + row, place, mask=taken)
    nothing = tl.full((P,), -1, tl.int64)
    tl.store(token_of_row + place, nothing, mask=inside & (place >= real))
    tl.store(place_of_row + place, nothing, mask=inside & (place >= real))


@triton.jit(do_not_specialize=["places"])
def _inverse_kernel(rows, token_of_row, place_of_row, places, K: tl.constexpr, P: tl.constexpr):
    """P places write their number to their rows."""
    place = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    row = tl.load(rows + place, mask=place < places, other=-1)
    tl.store(token_of_row + row, place // K, mask=row >= 0)
    tl.store(place_of_row + row, place, mask=row >= 0)


class Chosen(NamedTuple):
    """Where choices are written: experts and slots (T, K) int64, -1 = no row, and the rows of each slot in each block.

    counts_XB is (blocks, B) int32, of blocks of `per_block` tokens.
    """

    experts_TK: Tensor
    slots_TK: Tensor
    counts_XB: Tensor

    def args(self) -> dict[str, Any]:
        """Return the kernel arguments."""
        experts_TK, slots_TK, counts_XB = self
        return {"experts": experts_TK, "slots": slots_TK, "counts": counts_XB, "num_slots": counts_XB.shape[1]}


def slots(given_TK: Tensor, holders: Holders, per_block: int, *, chosen: Chosen) -> list[Launch]:
    """Fill `chosen` from contiguous integer ids; an id outside [0, E) and an absent expert have no row."""
    T, K = given_TK.shape
    args = {
        "given": given_TK,
        **holders.args(given_TK),
        **chosen.args(),
        "tokens": T,
        "E": holders.table_CE.shape[1],
        "K": K,
        "KP": power_of_2(K),
        "BT": per_block,
    }
    moved = T * K * (given_TK.element_size() + 16) + chosen.counts_XB.numel() * 4
    return [Launch(_slots_kernel, (chosen.counts_XB.shape[0],), args, 4, 1, bytes=moved)]


def rows(
    chosen: Chosen, per_block: int, before_XB: Tensor, totals_B: Tensor, out: tuple[Tensor, Tensor, Tensor, Tensor]
) -> list[Launch]:
    """Fill rows_TK, tokens_R, places_R and offsets_B1 from slots and their counts: 1 launch, 3 for many counts.

    Args:
        chosen: slots and counts, as a kernel left them.
        per_block: tokens of a block.
        before_XB, totals_B: int32 scratch of the shapes (blocks, B) and (B,).
        out: the four that are filled, int64.
    """
    (_, slots_TK, counts_XB), (rows_TK, tokens_R, places_R, offsets_B1) = chosen, out
    blocks, num_slots = counts_XB.shape
    K, few = slots_TK.shape[1], counts_XB.numel() <= FEW_COUNTS
    launches = []
    if not few:
        sums = {"totals": totals_B, "num_slots": num_slots}
        scan = {"counts": counts_XB, "before": before_XB, **sums, "blocks": blocks, "BLOCKS": 128, "SLOTS": 32}
        grid = (cdiv(num_slots, 32),)
        launches.append(Launch(_scan_kernel, grid, scan, 4, 1, bytes=counts_XB.numel() * 8))
        add = {**sums, "offsets": offsets_B1, "SLOTS": 1024}
        launches.append(Launch(_offsets_kernel, (1,), add, 4, 1, bytes=num_slots * 12))
    P = power_of_2(per_block * K)
    args = {
        "slots": slots_TK,
        "counts": counts_XB,
        "before": before_XB,
        "offsets": offsets_B1,
        "rows": rows_TK,
        "token_of_row": tokens_R,
        "place_of_row": places_R,
        "places": slots_TK.numel(),
        "blocks": blocks,
        "num_slots": num_slots,
        "K": K,
        "SIZE": per_block * K,
        "P": P,
        "STEP": 16,
        "FEW": few,
    }
    moved = slots_TK.numel() * 36 + counts_XB.numel() * 4
    # One program at least: it writes offsets_B1 even where there is no token.
    return [*launches, Launch(_rows_kernel, (max(1, blocks),), args, max(1, P // 32), 1, bytes=moved)]


def inverse(rows_TK: Tensor, *, tokens_R: Tensor, places_R: Tensor) -> list[Launch]:
    """Fill tokens_R and places_R of the real rows from rows_TK, as the backward needs them; what lies past them stays.

    Reads 8 and writes 16 bytes a place (6 MB at T * K = 262144, 4 us expected on an H100), which are not kept from the
    forward on.
    """
    (_, K), places = rows_TK.shape, rows_TK.numel()
    args = {"rows": rows_TK, "token_of_row": tokens_R, "place_of_row": places_R, "places": places, "K": K, "P": 512}
    return [Launch(_inverse_kernel, (cdiv(places, 512),), args, 4, 1, bytes=24 * places)] if places else []
