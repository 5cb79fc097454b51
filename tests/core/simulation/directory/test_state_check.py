"""A checkpoint whose digests were all made again is refused for tensors that no run of its configuration saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from small_plain import made
from torch import Tensor

from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.profile import ClientProfile, empty_profile, profile_arrays
from fedmoe_core.server.state import ServerState, initial_state, pack_older, pack_state, unpack_older, unpack_state
from fedmoe_core.simulation.buffered import InFlight, pack_in_flight, play_step, require_in_flight, unpack_in_flight
from fedmoe_core.simulation.directory.state_check import StateCheck
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.worlds.found_plain import found_plain

Packed = dict[str, Tensor]
LAYERS, EXPERTS, CLIENTS, ROUND = 2, 3, 4, 5


def profile(seed: int) -> ClientProfile:
    rng, like = np.random.default_rng(seed), profile_arrays(empty_profile(LAYERS, EXPERTS))
    drawn = {name: rng.random(array.shape) for name, array in like.items()}
    return ClientProfile(**{**drawn, "held_LE": drawn["held_LE"] > 0.5})


def state_and_check() -> tuple[ServerState, StateCheck]:
    params = {"dense.0": torch.randn(3, 2), "expert.0": torch.randn(2, 2, dtype=torch.bfloat16)}
    begin = replace(initial_state(params, CLIENTS), memory={"best": torch.full((CLIENTS,), -torch.inf)})
    state = replace(
        begin,
        round=ROUND,
        profiles=(None, profile(1), None, profile(3)),
        visits=(0, 5, 2, 1),
        memory={**begin.memory, "gate/1": torch.randn(3)},
    )
    return state, StateCheck(begin, LAYERS, EXPERTS, "runs/one/checkpoint")


def forgeries(packed: Packed) -> Iterator[tuple[str, Packed]]:
    """Each tensor missing, of other dtypes, of other shapes, with numbers that it cannot hold; and ones too many."""
    for key, tensor in packed.items():
        least = (
            "memory" in key and key != "memory/best"
        )  # only the algorithm knows what else it remembers, and its form
        name = key.rpartition("/")[2]
        if not least:
            yield f"{key} missing", {k: t for k, t in packed.items() if k != key}
            for dtype in {torch.int32, torch.float64, torch.float32, torch.int64} - {tensor.dtype}:
                yield f"{key} as {dtype}", {**packed, key: tensor.to(dtype)}
            yield f"{key} longer", {**packed, key: torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])}
            yield f"{key} with one more dimension", {**packed, key: tensor[None]}
            if tensor.ndim:
                yield f"{key} without its last row", {**packed, key: tensor[:-1]}
        if tensor.is_floating_point():
            numbers = [torch.nan] if "memory" in key else [torch.nan, torch.inf, -torch.inf]
            numbers += [0.5] if name == "held_LE" else []
        else:
            numbers = [-1, ROUND + CLIENTS + 1]
        for number in numbers if tensor.numel() else ():
            forged = tensor.clone()
            forged.view(-1)[-1] = number
            yield f"{key} with {number}", {**packed, key: forged}
        yield f"{key} twice", {**packed, f"{key}/again": tensor}


def refused(check: Callable[[Packed], None], packed: Packed, name: str = "it") -> str:
    sentence = ""
    try:
        check(packed)
    except ValueError as error:
        sentence = str(error)
    assert sentence, f"{name} was taken"
    assert "\n" not in sentence
    assert "cannot be this run's: its tensor" in sentence
    assert "start the run afresh" in sentence
    return sentence


def test_inv11_every_forged_tensor_of_a_state_is_refused_by_name() -> None:
    state, check = state_and_check()
    packed = pack_state(state)
    check.require(packed, ROUND)  # the control
    unpack_state(packed, round=ROUND)
    # A memory may grow by names that only the algorithm knows.
    cases = {
        name: forged for name, forged in forgeries(packed) if name not in ("memory/best twice", "memory/gate/1 twice")
    }
    assert len(cases) > 120
    for name, forged in cases.items():
        assert (
            name.split(" ")[0] in refused(lambda packed: check.require(packed, ROUND), forged, name)
            or "profiles" in name
        )
    assert "is not between 0 and 4" in refused(lambda packed: check.require(packed, 4), packed)


def test_clients_that_reported_are_named_once_in_order_and_are_of_the_run() -> None:
    state, check = state_and_check()
    packed = pack_state(state)
    for clients in ([3, 1], [1, 1], [1, CLIENTS], [-1, 3]):
        forged = {**packed, "profiles/clients": torch.tensor(clients)}
        assert "profiles/clients" in refused(lambda packed: check.require(packed, ROUND), forged)


def test_inv11_an_older_state_beside_the_newer_one_is_held_to_the_same_form() -> None:
    newer, check = state_and_check()
    older = replace(
        newer, round=3, params={**newer.params, "dense.0": torch.randn(3, 2)}, visits=(0, 2, 1, 0), memory={},
        profiles=(None, profile(7), None, None),
    )  # fmt: skip
    packed = pack_older(older, newer)
    check.require(packed, 3, whole=False)
    unpack_older(packed, newer, round=3)
    may_go = ("params/dense.0", "unheard", "unknown/best", "unknown/gate/1")  # an older state may share these
    cases = {name: forged for name, forged in forgeries(packed) if not (name.startswith(may_go) and "missing" in name)}
    free = ("unknown/", "unheard without")  # names alone matter; a shorter list may be true
    cases = {name: forged for name, forged in cases.items() if not name.startswith(free)}
    assert len(cases) > 80
    for name, forged in cases.items():
        refused(lambda packed: check.require(packed, 3, whole=False), forged, name)


def test_inv11_every_forged_tensor_of_what_is_in_flight_is_refused() -> None:
    words = ("adapter=own", "clients=6", "rounds=6", "threads=1", "train.batch_size=6", "train.local_steps=2")
    clock = (
        "time.mode=buffered",
        "time.buffer=2",
        "clients_per_round=4",
        "budgets=speed=1e3,uplink=1kbit;speed=1e4,uplink=9kbit",
    )
    world = found_plain(Config.load(overrides=[*words, *clock]).resolved(), made(), Ranks(), NullObserver())
    state, flying = world.algorithm.init(world.params), InFlight()
    for _ in range(ROUND):
        state, flying, _ = play_step(world, state, flying, NullObserver())
    packed, check = pack_in_flight(flying, state), StateCheck.of(world, "runs/one/checkpoint")
    require_in_flight(check, packed, ROUND)
    assert unpack_in_flight(packed, state).schedule == flying.schedule
    shared = ("params/", "unheard")
    cases = {
        name: forged
        for name, forged in forgeries(packed)
        if not ("missing" in name and any(f"/{part}" in name for part in shared)) and "drawn with 1" not in name
    }
    assert len(cases) > 60
    for name, forged in cases.items():
        refused(lambda packed: require_in_flight(check, packed, ROUND), forged, name)
