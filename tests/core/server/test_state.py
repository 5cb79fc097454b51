"""The server's state: what an algorithm remembers survives a checkpoint bit for bit."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made import model

from fedmoe_core.messages.profile import ClientProfile, profile_arrays
from fedmoe_core.server.state import initial_state, pack_older, pack_state, unpack_older, unpack_state
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


def drawn_profile(seed: int) -> ClientProfile:
    draw = np.random.default_rng(seed)
    arrays = {f.name: draw.random((2, 4) if f.name.endswith("_LE") else 2) for f in fields(ClientProfile)}
    return ClientProfile(**arrays | {"held_LE": arrays["held_LE"] > 0.5})


@pytest.mark.parametrize("once", [False, True], ids=["as written now", "a tensor for each client, as once written"])
def test_inv10_profiles_come_back_to_their_clients(once: bool) -> None:
    state = initial_state(model(), 5).advance(model(), {3: drawn_profile(3), 1: drawn_profile(1)}, [1, 3, 3])
    assert state.visits == (0, 1, 0, 1, 0)
    packed = pack_state(state)
    if once:
        packed = {key: tensor for key, tensor in packed.items() if not key.startswith("profiles/")}
        for client in (1, 3):
            for name, array in profile_arrays(drawn_profile(client)).items():
                packed[f"profiles/{client}/{name}"] = torch.from_numpy(np.asarray(array, dtype=np.float64))
    back = unpack_state(packed, round=1)
    assert [profile is None for profile in back.profiles] == [True, False, True, False, True]
    for client in (1, 3):
        found = back.profiles[client]
        assert found is not None
        for name, array in profile_arrays(drawn_profile(client)).items():
            assert np.array_equal(getattr(found, name), array), name
            assert getattr(found, name).dtype == array.dtype


def test_a_checkpoint_has_as_many_tensors_however_many_clients_were_heard() -> None:
    few, many = (
        initial_state(model(), 50).advance(model(), {client: drawn_profile(client) for client in range(heard)}, [])
        for heard in (1, 50)
    )
    assert pack_state(few).keys() == pack_state(many).keys()


def test_an_empty_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="no fedmoe server state"):
        unpack_state({"memory/a": torch.ones(1)}, round=0)


def test_inv10_an_older_state_comes_back_and_shares_with_the_newer_one_what_it_did() -> None:
    old = model()
    kept, moved = next(iter(old)), list(old)[1:]
    first = drawn_profile(1)
    older = initial_state(old, 4).advance(old, {1: first, 2: drawn_profile(2)}, [1, 2], memory={"a": torch.ones(2)})
    params = {**old, **{key: old[key] + 1 for key in moved}}
    memory = {**older.memory, "b": torch.zeros(3)}
    newer = older.advance(params, {2: drawn_profile(3), 3: drawn_profile(4)}, [2, 3], memory=memory)
    packed = pack_older(older, newer)
    assert {key for key in packed if key.startswith("params/")} == {f"params/{key}" for key in moved}
    assert packed["profiles/clients"].tolist() == [2]
    back = unpack_older(packed, newer, round=older.round)
    assert (back.round, back.visits) == (1, (0, 1, 1, 0))
    assert back.params[kept] is newer.params[kept]
    assert all(torch.equal(back.params[key], old[key]) for key in old)
    assert list(back.params) == list(old)
    assert [profile is None for profile in back.profiles] == [True, False, False, True]
    assert back.profiles[1] is newer.profiles[1]
    assert back.profiles[2] is not None
    for name, array in profile_arrays(drawn_profile(2)).items():
        assert np.array_equal(getattr(back.profiles[2], name), array), name
    assert list(back.memory) == ["a"]
    assert back.memory["a"] is newer.memory["a"]
