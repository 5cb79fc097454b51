"""Row order by slot: rows counted by block, summed up over blocks and slots, then every place told its row.

No atomics and no host sync. The order is stable, by slot, token and choice, because a place's row is a count of what
comes before it: smaller slots, the same slot in earlier blocks, the same slot earlier in the block.
Shapes: X blocks of `per_block` tokens, B slots, R = T * K places.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedmoe_kernels.gpu.choose import Holders, tokens_of_block
from fedmoe_kernels.gpu.launch import Launch

# Up to so many counts one program sums everything up, the slots' bounds too; beyond, programs share the slots and a
# second launch (about 3 us) adds up their totals. 16384 counts are 4 tiles, one after another.
ONE_PROGRAM = 16384


@triton.jit
def count(slot, counts, block, num_slots):
    """Write how many of a block's places `slot` (P,), -1 = none, belong to each slot.

    By comparison of each place with each slot: 256 comparisons a slot, and no two programs touch one counter.
    """
    for s0 in range(0, num_slots, 32):
        b = s0 + tl.arange(0, 32)
        rows = tl.sum((slot[:, None] == b[None, :]).to(tl.int32), 0)
        tl.store(counts + block.to(tl.int64) * num_slots + b, rows, mask=b < num_slots)


@triton.jit
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


@triton.jit
def _scan_kernel(
    counts, before, totals, offsets, blocks, num_slots,
    WHOLE: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """before[x, b]: rows of slot b in the blocks before x. WHOLE: one program does all slots and writes their bounds.

    The sums go to a second buffer: a thread may read a count again that another has finished with.
    """
    first = tl.program_id(0) * SLOTS
    stop = first + 1
    if WHOLE:
        stop = first + num_slots
        tl.store(offsets, 0)
    base = tl.zeros((), tl.int64)
    for s0 in range(first, stop, SLOTS):
        b = s0 + tl.arange(0, SLOTS)
        total = tl.zeros((SLOTS,), tl.int32)
        for x0 in range(0, blocks, BLOCKS):
            x = x0 + tl.arange(0, BLOCKS)
            inside = (x < blocks)[:, None] & (b < num_slots)[None, :]
            at = x.to(tl.int64)[:, None] * num_slots + b[None, :]
            rows = tl.load(counts + at, mask=inside, other=0)
            tl.store(before + at, total[None, :] + tl.cumsum(rows, 0) - rows, mask=inside)
            total += tl.sum(rows, 0)
        if WHOLE:
            end = base + tl.cumsum(total, 0)
            tl.store(offsets + 1 + b, end, mask=b < num_slots)
            base += tl.sum(total, 0)
        else:
            tl.store(totals + b, total, mask=b < num_slots)


@triton.jit
def _offsets_kernel(totals, offsets, num_slots, SLOTS: tl.constexpr):
    """One program adds up the totals of all slots."""
    tl.store(offsets, 0)
    base = tl.zeros((), tl.int64)
    for s0 in range(0, num_slots, SLOTS):
        b = s0 + tl.arange(0, SLOTS)
        total = tl.load(totals + b, mask=b < num_slots, other=0)
        tl.store(offsets + 1 + b, base + tl.cumsum(total, 0), mask=b < num_slots)
        base += tl.sum(total, 0)


@triton.jit
def _rows_kernel(
    slots, before, offsets, rows, token_of_row, place_of_row, places, num_slots,
    K: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program gives the SIZE places of a block their rows; it also writes -1 to those of its rows from N on."""
    block = tl.program_id(0)
    i = tl.arange(0, P)
    first = block.to(tl.int64) * SIZE
    place = first + i
    inside = (i < SIZE) & (place < places)
    slot = tl.load(slots + place, mask=inside, other=-1)
    rank = tl.zeros((P,), tl.int32)
    for i0 in range(0, P, STEP):
        other = i0 + tl.arange(0, STEP)
        theirs = tl.load(slots + first + other, mask=(other < SIZE) & (first + other < places), other=-1)
        rank += tl.sum(((theirs[None, :] == slot[:, None]) & (other[None, :] < i[:, None])).to(tl.int32), 1)
    real = slot >= 0
    start = tl.load(offsets + slot, mask=real, other=0)
    start += tl.load(before + block.to(tl.int64) * num_slots + slot, mask=real, other=0)
    row = tl.where(real, start + rank, -1)
    tl.store(rows + place, row, mask=inside)
    tl.store(token_of_row + row, place // K, mask=real)
    tl.store(place_of_row + row, place, mask=real)
    unused = inside & (place >= tl.load(offsets + num_slots))
    nothing = tl.full((P,), -1, tl.int64)
    tl.store(token_of_row + place, nothing, mask=unused)
    tl.store(place_of_row + place, nothing, mask=unused)


def slots(
    given_TK: Tensor,
    holders: Holders,
    *,
    num_slots: int,
    per_block: int,
    experts_TK: Tensor,
    slots_TK: Tensor,
    counts_XB: Tensor,
) -> list[Launch]:
    """Fill experts_TK and slots_TK, int64, -1 where there is no row, and counts_XB, from contiguous integer ids."""
    T, K = given_TK.shape
    args = {
        "given": given_TK,
        **holders.args(given_TK),
        "experts": experts_TK,
        "slots": slots_TK,
        "counts": counts_XB,
        "tokens": T,
        "num_slots": num_slots,
        "E": holders.table_CE.shape[1],
        "K": K,
        "KP": triton.next_power_of_2(K),
        "BT": per_block,
    }
    moved = T * K * (given_TK.element_size() + 16) + counts_XB.numel() * 4
    return [Launch(_slots_kernel, (counts_XB.shape[0],), args, 4, 1, bytes=moved)]


def rows(
    slots_TK: Tensor,
    counts_XB: Tensor,
    *,
    per_block: int,
    before_XB: Tensor,
    totals_B: Tensor,
    rows_TK: Tensor,
    tokens_R: Tensor,
    places_R: Tensor,
    offsets_B1: Tensor,
) -> list[Launch]:
    """Fill rows_TK, tokens_R, places_R and offsets_B1 from slots and their counts: 2 launches, 3 for many counts.

    Args:
        slots_TK: int64, -1 = no row.
        counts_XB: (blocks, B) int32, rows of each slot in each block of `per_block` tokens.
        per_block: tokens of a block.
        before_XB, totals_B: int32 scratch of the shapes (blocks, B) and (B,).
    """
    blocks, num_slots = counts_XB.shape
    K = slots_TK.shape[1]
    whole = counts_XB.numel() <= ONE_PROGRAM
    tables = {"counts": counts_XB, "before": before_XB, "totals": totals_B, "offsets": offsets_B1}
    sizes = {"blocks": blocks, "num_slots": num_slots, "WHOLE": whole, "BLOCKS": 128, "SLOTS": 32}
    programs = 1 if whole else triton.cdiv(num_slots, 32)
    launches = [Launch(_scan_kernel, (programs,), {**tables, **sizes}, 4, 1, bytes=counts_XB.numel() * 8)]
    if not whole:
        sums = {"totals": totals_B, "offsets": offsets_B1, "num_slots": num_slots, "SLOTS": 1024}
        launches.append(Launch(_offsets_kernel, (1,), sums, 4, 1, bytes=num_slots * 12))
    placing = {
        "slots": slots_TK,
        "before": before_XB,
        "offsets": offsets_B1,
        "rows": rows_TK,
        "token_of_row": tokens_R,
        "place_of_row": places_R,
        "places": slots_TK.numel(),
        "num_slots": num_slots,
        "K": K,
        "SIZE": per_block * K,
        "P": triton.next_power_of_2(per_block * K),
        "STEP": 16,
    }
    moved = slots_TK.numel() * 36 + counts_XB.numel() * 4
    return [*launches, Launch(_rows_kernel, (blocks,), placing, 4, 1, bytes=moved)]
