"""The names of a model's tensors: what is joined comes apart again, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from fedmoe_core.base.tensor_key import DENSE, TensorKey


@pytest.mark.parametrize("key", ["moe.0.router", "moe.12.w_in", "moe.3.out_scale", "dense.norm.weight", "dense.w"])
def test_a_key_comes_apart_and_together_again(key: str) -> None:
    place = TensorKey.parse(key)
    assert str(place) == key
    assert (place.layer == DENSE) == key.startswith("dense.")
    assert TensorKey.parse("moe.12.w_in") == TensorKey(12, "w_in")


@pytest.mark.parametrize("key", ["", "moe", "moe.1", "moe.1.", "moe.x.w_in", "moe.-1.w_in", "dense.", "router"])
def test_what_is_not_a_key_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key!r} is not a tensor's key; write moe.LAYER.NAME"):
        TensorKey.parse(key)
