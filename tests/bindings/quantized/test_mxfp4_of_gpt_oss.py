"""mxfp4 as gpt-oss stores it, bit for bit against transformers' own decoder, and experts that run on it."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fedmoe_bindings.quantized.mxfp4 import read_mxfp4, write_mxfp4
from fedmoe_bindings.quantized.rows import plain, rows_in_turn, sorted_rows
from fedmoe_kernels import ExpertWeights, moe_mlp, route
from fedmoe_kernels.quantized import Quantized

E, H, WIDE = 3, 64, 32  # WIDE is I


def drawn(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code with both signs, and scales around those of real weights."""
    torch.manual_seed(rows)
    blocks = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(110, 130, (E, rows, columns // 32), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gated", [False, True])
def test_bit_for_bit_as_transformers_decodes_them(gated, dtype):
    blocks, scales = drawn(2 * WIDE, H)
    truth = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # (E, H, rows)
    codes = read_mxfp4(blocks, scales, gated=gated)
    assert tuple(codes.shape) == (E, 2 * WIDE, H)
    want = sorted_rows(truth.mT) if gated else truth.mT
    assert torch.equal(codes.dequantize(dtype), want)
    assert torch.equal(plain(codes, dtype, interleaved=gated, transposed=True), truth)
    again = write_mxfp4(codes, gated=gated)
    assert all(torch.equal(*pair) for pair in zip(again, (blocks, scales), strict=True))


def test_rows_of_gate_and_up():
    rows = torch.arange(12).view(1, 6, 2)
    assert sorted_rows(rows)[0, :, 0].tolist() == [0, 4, 8, 2, 6, 10]
    assert torch.equal(rows_in_turn(sorted_rows(rows)), rows)
    bias = torch.arange(6)[None]
    assert sorted_rows(bias).tolist() == [[0, 2, 4, 1, 3, 5]]


def test_experts_run_on_the_codes_as_on_the_decoded_weights():
    """swiglu_oai with biases, gpt-oss' own activation: the codes are decoded tile by tile, or once."""
    w_in = read_mxfp4(*drawn(2 * WIDE, H), gated=True)
    w_out = read_mxfp4(*drawn(H, WIDE), gated=False)
    x, routing = torch.randn(9, H), route(torch.randn(9, E), 2)
    none_in, none_out = torch.zeros(0, 2 * WIDE, H), torch.zeros(0, H, WIDE)
    coded = moe_mlp(x, routing, ExpertWeights(none_in, w_in), ExpertWeights(none_out, w_out), activation="swiglu_oai")
    decoded = moe_mlp(
        x, routing, w_in.dequantize(torch.float32), w_out.dequantize(torch.float32), activation="swiglu_oai"
    )
    assert ((coded - decoded).norm() / decoded.norm()) < 1e-5


def test_other_tensors_are_refused():
    blocks, scales = drawn(4, 64)
    with pytest.raises(ValueError, match=r"they must be uint8 \(E, rows, groups, 16\)"):
        read_mxfp4(blocks[..., :8], scales, gated=False)
    with pytest.raises(ValueError, match="a scale is 255, which stands for NaN"):
        read_mxfp4(blocks, scales.clone().fill_(255), gated=False)
    with pytest.raises(ValueError, match="gated with even rows"):
        read_mxfp4(blocks[:, :3], scales[:, :3], gated=True)
    with pytest.raises(ValueError, match="gpt-oss has mxfp4 in"):
        write_mxfp4(Quantized.of(torch.randn(1, 4, 64), "nf4"), gated=False)
