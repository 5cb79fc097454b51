"""The server's state: what an algorithm remembers survives a checkpoint bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hand_made import model

from fedmoe_core.server.state import initial_state, pack_state, unpack_state
from fedmoe_core.simulation.directory.checkpoint import load_checkpoint, save_checkpoint

MEMORY = {
    "scores/3": torch.tensor([[0.1, float("nan")], [-0.0, float("inf")]], dtype=torch.float64),
    "frozen": torch.tensor([True, False]),
    "patience": torch.tensor([3, -1]),
    "theta": torch.tensor(0.3),  # a number is a tensor without an axis
    "gate/1/moe.0.router": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "nobody": torch.zeros(0, 5),
}


def test_inv10_memory_survives_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    state = initial_state(model(), 3).advance(model(1), {}, [0, 2], memory=MEMORY)
    save_checkpoint(tmp_path, pack_state(state), {}, {})
    back = unpack_state(load_checkpoint(tmp_path).tensors, round=state.round)
    assert set(back.memory) == set(MEMORY)
    for name, tensor in MEMORY.items():
        found = back.memory[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    assert all(torch.equal(back.params[key], value) for key, value in state.params.items())


def test_memory_is_empty_at_first_and_stays_until_it_is_replaced() -> None:
    state = initial_state(model(), 2)
    assert dict(state.memory) == {}
    assert not [key for key in pack_state(state) if key.startswith("memory/")]
    later = state.advance(model(), {}, [0], memory=MEMORY).advance(model(), {}, [1])
    assert later.memory is MEMORY
    assert later.visits == (1, 1)


def test_a_key_of_memory_cannot_be_taken_for_a_parameter() -> None:
    state = initial_state(model(), 1).advance(model(), {}, [], memory={"params/moe.0.router": torch.ones(1)})
    back = unpack_state(pack_state(state), round=1)
    assert set(back.params) == set(model())
    assert list(back.memory) == ["params/moe.0.router"]


def test_an_empty_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="no fedmoe server state"):
        unpack_state({"memory/a": torch.ones(1)}, round=0)
