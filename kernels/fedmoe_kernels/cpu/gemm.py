"""The two dense products of an expert on CPU, by the faster of the two libraries that torch carries.

torch.mm sends float32 to MKL, which takes AVX2 kernels on AMD processors whatever they offer. On a Zen 5 core that is
112 GFLOP/s, while oneDNN's AVX-512 kernels reach 230 to 250 on the same operands, output copy included (measured with
torch 2.13 on one thread at 64 to 1024 rows). Elsewhere torch.mm writes straight into its destination.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Below this the fixed cost of a oneDNN call (10 us against 3 us) outweighs its rate.
_SMALLEST_ONEDNN_FLOPS = 2**20


@dataclass(frozen=True)
class Gemm:
    """Products of one dtype on CPU; `product(a_MK, w_NK, bias_N)` is a @ w.T + bias by oneDNN, None = use torch.mm.

    oneDNN compiles a kernel for every new shape (0.4 to 1.5 ms), and the rows of a slot differ at every step. So its
    row counts are bucketed, eight sizes an octave; what that adds or leaves over is at most an eighth of the rows.
    """

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None

    def rows_into(
        self, out_MN: Tensor, buffer_XK: Tensor, start: int, w_NK: Tensor, *, bias_N: Tensor | None = None
    ) -> None:
        """Write out = buffer[start : start + M] @ w.T + bias, rounded once; `w_NK` may be a transposed view.

        Up to `slack(M)` later rows of the buffer may be read, and their products dropped, so they need not hold
        anything in particular: a row of a product depends on that row alone.
        """
        m = out_MN.shape[0]
        if self.product is None or m * w_NK.numel() < _SMALLEST_ONEDNN_FLOPS // 2:
            if bias_N is None:
                torch.mm(buffer_XK[start : start + m], w_NK.t(), out=out_MN)
            else:
                torch.addmm(bias_N, buffer_XK[start : start + m], w_NK.t(), out=out_MN)
            return
        stop = min(start + m + slack(m), buffer_XK.shape[0])
        out_MN.copy_(self.product(buffer_XK[start:stop], w_NK, bias_N)[:m])

    def outer_into(self, out_NK: Tensor, d_MN: Tensor, a_MK: Tensor, *, add: bool) -> None:
        """Write out = d.T @ a, or out += d.T @ a with `add`; rows left over by the bucket go through torch."""
        whole = d_MN.shape[0] // _step(d_MN.shape[0]) * _step(d_MN.shape[0])
        if self.product is None or whole * out_NK.numel() < _SMALLEST_ONEDNN_FLOPS // 2:
            if add:
                out_NK.addmm_(d_MN.t(), a_MK)
            else:
                torch.mm(d_MN.t(), a_MK, out=out_NK)
            return
        product_NK = self.product(d_MN[:whole].t(), a_MK[:whole].t(), None)
        if add:
            product_NK += out_NK
        if whole < d_MN.shape[0]:
            torch.addmm(product_NK, d_MN[whole:].t(), a_MK[whole:], out=out_NK)
        else:
            out_NK.copy_(product_NK)


def slack(rows: int) -> int:
    """Count the rows that a bucketed product may read past `rows`."""
    return -rows % _step(rows)


def most_slack(rows: int) -> int:
    """Return the most that `slack` gives for any count up to `rows`: what such a buffer needs behind its rows."""
    return _step(rows) - 1


def _step(rows: int) -> int:
    return max(16, (1 << rows.bit_length()) >> 4)


def gemm_for(dtype: torch.dtype) -> Gemm:
    """Choose the products for a dtype on this machine; the same in every process on the same kind of device."""
    if dtype == torch.float32 and _onednn_beats_mkl():
        return Gemm(_onednn_linear)
    if dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return Gemm(torch.nn.functional.linear)  # oneDNN already; what it gains is the buckets
    return Gemm(None)


def _onednn_linear(a_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    # The operator behind torch.compile's CPU linear layers; torch has no public name for a oneDNN float32 product.
    return torch.ops.mkldnn._linear_pointwise(a_MK, w_NK, bias_N, "none", [], "")


@functools.cache
def _onednn_beats_mkl() -> bool:
    """Tell if this is an AMD processor with AVX-512 whose torch has a working oneDNN operator."""
    cpuinfo = Path("/proc/cpuinfo")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not cpuinfo.exists():
        return False
    if "AuthenticAMD" not in cpuinfo.read_text() or not torch.backends.mkldnn.is_available():
        return False
    a_MK, w_NK = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(_onednn_linear(a_MK, w_NK, None), a_MK @ w_NK.t())
    except (AttributeError, RuntimeError):  # a later torch may rename or drop it; torch.mm is always right
        return False
