"""What both paths of routing hold to: limits, the sigmoid's epsilon and the type of the arithmetic."""

from __future__ import annotations

import torch

# A sigmoid score can underflow to 0 for every chosen expert; the models of this family add the same constant.
SIGMOID_EPS = 1e-20


# What the kernels serve: k passes over a row of logits in registers, sums of 2^24 fixed-point terms in 63 bits.
MOST_CHOICES, MOST_EXPERTS, MOST_TOKENS = 16, 4096, 2**24


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that routing computes in and returns: float64 for float64 logits, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
