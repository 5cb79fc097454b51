"""nf4 as bitsandbytes stores it, bit for bit against what that library decodes; make_nf4.py made the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmoe_bindings.quantized.nf4 import read_nf4
from fedmoe_bindings.quantized.rows import gate_and_up, plain, stacked
from fedmoe_kernels.quantized import Quantized

STATE = "quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def stored():
    return load_file(Path(__file__).with_name("nf4.safetensors"))


@pytest.mark.parametrize("nested", ["single", "nested"])
@pytest.mark.parametrize("name", ["aligned", "straddling", "odd"])
def test_decoded_once_bit_for_bit(stored, name, nested):
    want = stored[f"decoded.{name}.{nested}"]
    weight = read_nf4(stored, f"{name}.{nested}")
    assert weight.dtype == torch.float32
    assert torch.equal(weight.plain(), want)
    assert torch.equal(weight.plain(torch.bfloat16), want.bfloat16())
    # Half the widest gap of levels, 0.152 of the largest magnitude, and what nesting rounds.
    assert (want - stored[f"drawn.{name}.{nested}"]).abs().max() < 0.17 * weight.absmax.max()


@pytest.mark.parametrize("nested", ["single", "nested"])
@pytest.mark.parametrize(("name", "block"), [("aligned", (1, 64)), ("straddling", (1, 32))])
def test_codes_are_kept_bit_for_bit(stored, name, block, nested):
    want = stored[f"decoded.{name}.{nested}"]
    codes = read_nf4(stored, f"{name}.{nested}").quantized()
    assert codes.format == "nf4"
    assert codes.block == block
    assert tuple(codes.shape) == (want.shape if want.dim() == 3 else (1, *want.shape))
    assert torch.equal(codes.dequantize(torch.float32).view(want.shape), want)
    assert torch.equal(plain(codes, torch.float32, transposed=True)[0], want.view(-1, *want.shape[-2:])[0].T)


def test_rows_without_a_run_of_32_are_only_decoded(stored):
    with pytest.raises(ValueError, match=r"rows of 40 weights in blocks of 64 .*; decode them with plain\(\)"):
        read_nf4(stored, "odd.single").quantized()


def test_experts_stored_one_by_one_are_stacked(stored):
    one = read_nf4(stored, "straddling.single").quantized()
    other = read_nf4(stored, "straddling.nested").quantized()
    both = stacked([one, other])
    assert torch.equal(both[1].dequantize(torch.float32), other.dequantize(torch.float32))
    w_in = gate_and_up(one, other)
    assert torch.equal(w_in.dequantize(torch.float32)[:, 3:], other.dequantize(torch.float32))
    with pytest.raises(ValueError, match=r"weights in 2 formats \(mxfp4, nf4\)"):
        stacked([one, Quantized.of(torch.randn(1, 3, 96), "mxfp4")])
    coarse = Quantized.of(torch.randn(1, 3, 96), "nvfp4")
    with pytest.raises(ValueError, match="gate and up in nvfp4 have a scale each"):
        gate_and_up(coarse, coarse)


def test_damaged_and_foreign_weights_are_refused_by_name(stored):
    name = "aligned.nested"
    for part in ("", ".absmax", ".quant_map", ".nested_absmax", f".{STATE}"):
        lost = {key: value for key, value in stored.items() if key != name + part}
        with pytest.raises(ValueError, match=f"the state has no {name}{part}"):
            read_nf4(lost, name)
    with pytest.raises(ValueError, match="has other levels than nf4"):
        read_nf4(stored | {f"{name}.quant_map": torch.linspace(-1, 1, 16)}, name)
    with pytest.raises(ValueError, match=r"has 767 bytes and 24 magnitudes; .* needs 768 and 24"):
        read_nf4(stored | {name: stored[name][1:]}, name)
    said = json.loads(bytes(stored[f"{name}.{STATE}"].tolist()))
    flat = json.dumps(said | {"shape": [12 * 128]}).encode()
    with pytest.raises(ValueError, match="two or three axes"):
        read_nf4(stored | {f"{name}.{STATE}": torch.tensor(list(flat), dtype=torch.uint8)}, name)


def test_against_the_library_itself_where_it_is_installed():
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    for shape, blocksize, nested in (((64, 128), 128, True), ((3, 16, 192), 64, True), ((48, 64), 64, False)):
        packed, state = functional.quantize_4bit(
            torch.randn(shape), quant_type="nf4", blocksize=blocksize, compress_statistics=nested
        )
        tensors = {f"w.{part}": value for part, value in state.as_dict(packed=True).items()} | {"w": packed}
        want, weight = functional.dequantize_4bit(packed, state), read_nf4(tensors, "w")
        assert torch.equal(weight.plain(), want)
        assert torch.equal(weight.quantized().dequantize(torch.float32).view(shape), want)
