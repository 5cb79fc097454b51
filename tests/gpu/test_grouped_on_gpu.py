"""The plain grouped products, and megablocks' layer on them, on a GPU: against float64, and twice the same bits.

No GPU has run this yet; without one the kernels run in tests/interpret/experts/test_grouped_products.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from dmoe_truth import relative, truth
from torch import Tensor, nn

from fedmoe_bindings.megablocks import Arguments, dMoE
from fedmoe_kernels import grouped_mm, grouped_outer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(600),
]
# Rows per slot and places beyond them: of the widest tiles, of the narrowest, and of sizes that no block divides.
SHAPES = {
    "many rows": ((300, 0, 700, 1), 40, 256, 512),
    "few rows": ((3, 0, 17, 1, 9), 0, 128, 256),
    "odd": ((37, 5, 0), 3, 100, 52),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_inv4_the_products_equal_float64(shape: str, transposed: bool, dtype: torch.dtype, tolerance: float) -> None:
    counts, beyond, N, K = SHAPES[shape]
    R, draw = sum(counts) + beyond, torch.Generator("cuda").manual_seed(0)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], device="cuda")

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device="cuda").to(dtype)

    a, w, dy = drawn(R, K), drawn(len(counts), *((K, N) if transposed else (N, K))) / K**0.5, drawn(R, N)
    found = []
    for cast, backend in ((torch.float64, "cpu"), (dtype, "triton"), (dtype, "triton")):
        given = [t.to(cast).requires_grad_() for t in (a, w)]
        y = grouped_mm(*given, offsets, transposed=transposed, backend=backend)
        outer = grouped_outer(given[0].detach(), dy.to(cast), offsets, backend=backend)
        found.append([y.detach(), outer, *torch.autograd.grad(y, given, dy.to(cast))])
    for name, want, got, again in zip(("y", "outer", "da", "dw"), *found, strict=True):
        assert relative(got, want) < tolerance, name
        assert torch.equal(got, again), f"{name} has other bits in a second run"


@pytest.mark.parametrize("mlp_type", ["glu", "mlp"])
def test_the_dropless_layer_equals_the_loops(mlp_type: str) -> None:
    args = Arguments(64, 96, moe_num_experts=4, moe_top_k=2, mlp_type=mlp_type, fp16=False, return_bias=False)
    layer = dMoE(args).cuda()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(33, 64, device="cuda")
    want = truth(args, {name: p.detach().double().cpu() for name, p in layer.named_parameters()}, x.double().cpu()).out
    assert relative(layer(x).cpu(), want) < 1e-5
