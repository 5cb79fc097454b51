"""Rows, weights and tiles for the tests of the forward kernels, and the products that they must equal, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmoe_kernels.configs import Tile
from fedmoe_kernels.gpu.launch import Launch
from fedmoe_kernels.gpu.schedule import Schedule, schedule
from fedmoe_kernels.gpu.storage import Stored

POINTERS = Tile(16, 16, 16, 1, 1, group=2)
DESCRIPTORS = Tile(16, 16, 16, 1, 1, group=2, tma=True)
EMPTY_SLOTS = (5, 0, 19, 0, 3)  # rows per slot: empty ones inside, and one of more than a tile
CROWDED = (0, 37, 0)


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


def coded(whole: Tensor, trainable: int, bits: int, share: int = 32) -> tuple[Stored, Tensor]:
    """Slots from `trainable` on as random codes with random scales, and all slots as they decode, in float64."""
    frozen = whole[trainable:]
    generator = torch.Generator().manual_seed(bits)
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, frozen.shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(*frozen.shape[:2], frozen.shape[2] // share, generator=generator) / most
    decoded = codes.double() * scale.double().repeat_interleave(share, 2)
    low, high = (codes + 8).to(torch.uint8).unflatten(2, (-1, 2)).unbind(3)
    kept = codes if bits == 8 else low | (high << 4)
    return Stored(whole[:trainable].contiguous(), kept, scale), torch.cat([whole[:trainable].double(), decoded])


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
