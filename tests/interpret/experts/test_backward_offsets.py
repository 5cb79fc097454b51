"""The backward beyond 2^31 elements, executed: tensors of over 4 GB of which only the last pages are ever touched."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

from backward_cases import TILE
from forward_cases import assert_near, normal, run
from test_forward_offsets import ROWS, far, half, one_tile

from fedmoe_kernels.gpu.experts.data_gradient import data_gradient
from fedmoe_kernels.gpu.experts.row_sums import routing_gradient
from fedmoe_kernels.gpu.experts.storage import RowIndex, Stored
from fedmoe_kernels.gpu.experts.weight_gradient import bias_gradient, weight_gradient

H, I = 64, 32  # noqa: E741


@pytest.fixture(autouse=True)
def _untouched(poisoned: None) -> None:
    """Poison would touch every page of the 4 GB; the fixture `poisoned` undoes this when the test ends."""
    torch.use_deterministic_algorithms(False)


def at_end(values: Tensor, size: int) -> Tensor:
    """`size` values of which only the last ones, the given, are written."""
    tensor = torch.empty(size, dtype=values.dtype)
    tensor[size - len(values) :] = values
    return tensor


@pytest.mark.parametrize("where", ["tokens", "places", "rows", "slots", "frozen slots"])
def test_data_gradient(where: str) -> None:
    dy, w, z = half(ROWS, H, seed=1), half(1, H, I, seed=2), half(ROWS, I, seed=3)
    s_N, first, slot = normal(ROWS, seed=4).half(), 0, 0
    dy_TH, z_RF, w_out, tokens_R, places_R, weights = dy, z, Stored(w), torch.arange(ROWS), torch.arange(ROWS), s_N
    dz, sh = torch.empty(ROWS, I, dtype=torch.float16), torch.empty(ROWS, I, dtype=torch.float16)
    if where == "tokens":
        dy_TH = far(H, last=dy)
        tokens_R = tokens_R + len(dy_TH) - ROWS
    if where == "places":
        weights = far(last=s_N)
        places_R = places_R + len(weights) - ROWS
    if where == "rows":
        z_RF, dz, sh = far(I, last=z), far(I), far(I)
        first = len(z_RF) - ROWS
        tokens_R, places_R = at_end(tokens_R, len(z_RF)), at_end(places_R, len(z_RF))
    if where == "slots":
        w_out = Stored(far(H, I, last=w))
        slot = len(w_out.trainable) - 1
    if where == "frozen slots":
        w_out = Stored(w, far(H, I, last=w))
        slot = len(w_out.frozen)
    run(
        data_gradient(
            *(dy_TH, z_RF, RowIndex(tokens_R, places_R, weights[:, None]), w_out),
            dz_RF=dz,
            sh_RI=sh,
            ds_RC=None,
            zdz_MC=None,
            activation="relu",
            schedule=one_tile(slot, first),
            tile=TILE,
        )
    )
    d, s_N1 = dy.double() @ w[0].double(), s_N.double()[:, None]
    assert_near(dz[first:], s_N1 * d * (z > 0), "dz", tolerance=1e-3)
    assert_near(sh[first:], s_N1 * z.double().relu(), "sh", tolerance=1e-3)


@pytest.mark.parametrize("where", ["left", "left by token", "right", "right by token"])
def test_weight_and_bias_gradients(where: str) -> None:
    """Two slots, of which the first has no row."""
    left, right = half(ROWS, 32, seed=1), half(ROWS, 48, seed=2)
    side, by_token = where.split()[0], "token" in where
    huge = far(32, last=left) if side == "left" else far(48, last=right)
    first = 0 if by_token else len(huge) - ROWS
    sides = {"left": left, "right": right, side: huge}
    tokens = {"left_tokens": None, "right_tokens": None}
    other = "right" if side == "left" else "left"
    if by_token:
        tokens[f"{side}_tokens"] = torch.arange(ROWS) + len(huge) - ROWS
    else:
        tokens[f"{other}_tokens"] = at_end(torch.arange(ROWS), len(huge))
    offsets_B1, out = torch.tensor([first, first, first + ROWS]), torch.empty(2, 32, 48, dtype=torch.float16)
    run(weight_gradient(sides["left"], sides["right"], out, offsets_B1=offsets_B1, tile=TILE, **tokens))
    assert_near(out[1], left.double().t() @ right.double(), "dW", tolerance=1e-3)
    assert (out[0] == 0).all()

    rows, bias = sides[side][-ROWS:].double(), torch.empty(2, sides[side].shape[1])
    places_R, weights = torch.arange(ROWS), normal(ROWS, 1, seed=3)
    index = RowIndex(tokens[f"{side}_tokens"], places_R, weights) if by_token else None
    run(bias_gradient(sides[side], bias, offsets_B1=offsets_B1, routing=index))
    weighted = rows * weights.double() if by_token else rows
    assert_near(bias[1], weighted.sum(0), "db", tolerance=1e-3)


@pytest.mark.parametrize("where", ["rows", "tokens", "biases"])
def test_routing_gradient(where: str) -> None:
    ds, dy, bias = half(ROWS, I, seed=1), half(ROWS, H, seed=2), half(1, H, seed=3)
    ds_RC, dy_TH, bias_out, first, slot = ds, dy, Stored(bias), 0, 0
    tokens_R, places_R = torch.arange(ROWS), torch.arange(ROWS).flip(0)
    if where == "rows":
        ds_RC = far(I, last=ds)
        first = len(ds_RC) - ROWS
        tokens_R, places_R = at_end(tokens_R, len(ds_RC)), at_end(places_R, len(ds_RC))
    if where == "tokens":
        dy_TH = far(H, last=dy)
        tokens_R = tokens_R + len(dy_TH) - ROWS
    if where == "biases":
        bias_out = Stored(bias, far(H, last=bias))
        slot = len(bias_out.frozen)
    out_TK, weights_TK = torch.empty(ROWS, 1), torch.empty(ROWS, 1)
    index, rows_TK = RowIndex(tokens_R, places_R, weights_TK), torch.zeros(ROWS, 1, dtype=torch.int64)
    how = {"schedule": one_tile(slot, first), "dy_TH": dy_TH, "bias_out": bias_out}
    run(routing_gradient(ds_RC, index, rows_TK, out_TK, **how))
    want = ds.double().sum(1) + dy.double() @ bias[0].double()
    assert_near(out_TK[:, 0].flip(0), want, "dS", tolerance=1e-3)
