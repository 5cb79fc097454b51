"""Stored formats decoded by the kernels, in Triton's interpreter: the numbers of `formats.dequantize`, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from fedmoe_kernels import Quantized
from fedmoe_kernels.formats import FORMATS
from fedmoe_kernels.gpu.experts.decode import Codes, decode
from fedmoe_kernels.gpu.experts.memory import ROOM, decodes, slots_at_once


def decoded(q: Quantized, dtype: torch.dtype) -> Tensor:
    """What the kernel writes, into memory that holds NaN."""
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    decode(q.codes, Codes(q.format, q.scale, q.whole), out).run()
    return out


def every_code(form: str) -> Quantized:
    """All bytes, each under 32 different scales, the odd ones of the format included: (32, 4, 64 or 128)."""
    stored, draw = FORMATS[form], torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 4, 64).expand(32, 4, 64).contiguous()
    columns = stored.block[1] if stored.bits == 4 else 32
    groups = 64 * 8 // stored.bits // columns
    if stored.scale == torch.float32:
        scale = torch.randn(32, 4, groups, generator=draw)
    else:
        scale = torch.randint(256, (32, 4, groups), dtype=torch.uint8, generator=draw)
        scale[0].fill_(0)
        scale[1].fill_(255)  # NaN in both formats of scales
        scale = scale.view(stored.scale)
    whole = torch.randn(32, generator=draw) if stored.whole else None
    return Quantized(codes.view(stored.codes), scale, form, whole)


@pytest.mark.filterwarnings("ignore:overflow")  # 2 ** 127 times 6
@pytest.mark.parametrize("form", FORMATS)
def test_every_code_under_odd_scales_has_its_bits(form: str) -> None:
    q = every_code(form)
    want, got = q.dequantize(torch.float32), decoded(q, torch.float32)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(40, 96), (16, 320), (128, 128)])
def test_shapes_that_blocks_do_not_divide(rows: int, columns: int, form: str, dtype: torch.dtype) -> None:
    w = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(rows)) / 4
    q = Quantized.of(w, form)
    assert torch.equal(decoded(q, dtype), q.dequantize(dtype))


def test_codes_are_decoded_first_where_a_slot_has_many_rows() -> None:
    assert [decodes("mxfp4", rows) for rows in (16, 639, 640, 4096)] == [False, False, True, True]
    assert [decodes("nf4", rows) for rows in (16, 191, 192, 4096)] == [False, False, True, True]


def test_as_many_slots_at_once_as_there_is_room_for_in_equal_pieces() -> None:
    one = ROOM // 5
    assert [slots_at_once(slots, one) for slots in (1, 5, 6, 10, 11, 128)] == [1, 5, 3, 5, 4, 5]
    assert slots_at_once(3, 2 * ROOM) == 1
