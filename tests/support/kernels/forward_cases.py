"""Rows, weights and tiles for the tests of the forward kernels, and the products that they must equal, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_kernels import Quantized
from fedmoe_kernels.gpu.experts.decode import Codes
from fedmoe_kernels.gpu.experts.schedule import Schedule, schedule
from fedmoe_kernels.gpu.experts.storage import Stored
from fedmoe_kernels.gpu.launch import Launch
from fedmoe_kernels.tiles.lookup import Tile

POINTERS = Tile(16, 16, 16, 1, 1, group=2)
DESCRIPTORS = Tile(16, 16, 16, 1, 1, group=2, tma=True)
EMPTY_SLOTS = (5, 0, 19, 0, 3)  # rows per slot: empty ones inside, and one of more than a tile
CROWDED = (0, 37, 0)
# Every format, with blocks of more columns than a kernel's (third) and of fewer, for matrices of 96 columns and 8 rows
# or more; last, how many slots are trainable.
STORED = (
    *(("int8", (1, 32), 64, 0), ("int8", (1, 96), 64, 2), ("int4", (1, 96), 16, 0), ("int4", (1, 32), 32, 3)),
    *(("fp8_e4m3", (8, 32), 64, 0), ("fp8_e4m3", (1, 96), 16, 2), ("mxfp4", (1, 32), 64, 0)),
    *(("nvfp4", (1, 16), 64, 0), ("nvfp4", (2, 48), 32, 2), ("nf4", (1, 32), 64, 0)),
)


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows in slots, with places beyond them.

    Attributes:
        tokens_R: the token of each row, any; -1 past the last row.
        slot_N: the slot of each row.
        schedule: tiles of 16 rows.
    """

    tokens_R: Tensor
    slot_N: Tensor
    schedule: Schedule

    @property
    def count(self) -> int:
        """N."""
        return len(self.slot_N)


def rows(counts: Sequence[int], tokens: int, absent: int = 4, seed: int = 0) -> Rows:
    """`counts[b]` rows in slot b, each of a random token, and `absent` places without a row."""
    offsets_B1 = torch.tensor([0, *itertools.accumulate(counts)])
    n = sum(counts)
    tokens_R = torch.full((n + absent,), -1)
    tokens_R[:n] = torch.randint(max(tokens, 1), (n,), generator=torch.Generator().manual_seed(seed))
    slot_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Rows(tokens_R, slot_N, schedule(offsets_B1, n + absent, POINTERS.m))


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal float32, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output before its kernel: NaN, so that a forgotten element is loud."""
    return torch.full(shape, torch.nan, dtype=dtype)


def stored(whole: Tensor, trainable: int | None) -> Stored:
    """A stack in one tensor, or with the slots from `trainable` on in a second; NaN lies around and between them."""

    def fenced(part: Tensor) -> Tensor:
        fence = torch.full((part.numel() + 128,), torch.nan)
        inside = fence[64 : 64 + part.numel()].view(part.shape)
        return inside.copy_(part)

    if trainable is None:
        return Stored(fenced(whole))
    return Stored(fenced(whole[:trainable]), fenced(whole[trainable:]))


def coded(
    whole: Tensor, trainable: int, form: str, block: tuple[int, int], *, at_once: int = 0
) -> tuple[Stored, Tensor]:
    """Slots from `trainable` on as the codes of random weights, and all slots as they decode, in float64.

    With `at_once` so many slots are decoded before each product.
    """
    frozen = torch.randn(whole[trainable:].shape, generator=torch.Generator().manual_seed(len(form)))
    q = Quantized.of(frozen / whole.shape[2] ** 0.5, form, block)
    learning, codes = whole[:trainable].contiguous(), Codes(form, q.scale, q.whole)
    room = torch.full((at_once, *whole.shape[1:]), torch.nan) if at_once else None
    told = torch.cat([learning.double(), q.dequantize(torch.float64)])
    return Stored(learning, q.codes, codes, room=room), told


def run(launches: list[Launch]) -> None:
    """Start all launches in order."""
    for launch in launches:
        launch.run()


def per_row(rows_NK: Tensor, w: Tensor, slot_N: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ w[slot]^T + bias[slot] in float64; w is (B, N, K)."""
    out = torch.einsum("nk,nmk->nm", rows_NK.double(), w.double()[slot_N])
    return out if bias is None else out + bias.double()[slot_N]


def assert_near(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Relative L2 norm."""
    assert got.shape == want.shape, what
    error, size = float((got.double() - want).norm()), float(want.norm())
    assert error <= tolerance * size, f"{what}: relative error {error / size if size else error:.1e}"
