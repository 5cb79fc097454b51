"""Who trains whom is a balanced partition on which all ranks agree; what they report arrives as it was sent."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_core.simulation import launch
from fedmoe_core.simulation.process_group import CPU, Ranks, open_ranks

COSTS = st.lists(st.floats(0, 1e15, allow_nan=False), max_size=24)


def shares(costs: list[float], world: int) -> list[list[int]]:
    return [Ranks(rank, world).mine(range(len(costs)), costs) for rank in range(world)]


@given(COSTS, st.integers(1, 6))
def test_inv10_shares_are_a_partition_in_the_order_given(costs: list[float], world: int) -> None:
    parts = shares(costs, world)
    assert sorted(item for part in parts for item in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in parts)


@given(COSTS, st.integers(1, 6))
def test_longest_first_is_within_one_item_of_even(costs: list[float], world: int) -> None:
    """Graham's bound for longest-first: the fullest rank is at most (4/3 - 1/3m) of the best split.

    The best split is at least the mean load and at least the longest item; against those two alone the greedy rule
    promises mean + (1 - 1/m) longest.
    """
    loads = [math.fsum(costs[item] for item in part) for part in shares(costs, world)]
    bound = math.fsum(costs) / world + (1 - 1 / world) * max(costs, default=0)
    assert max(loads) <= bound * (1 + 1e-9)


def test_longest_first_by_hand() -> None:
    # 7 -> rank 0, 5 -> rank 1, 4 -> rank 1 (5 < 7), 3 -> rank 0 (7 < 9), 2 -> rank 1 (9 < 10).
    assert shares([4, 7, 2, 5, 3], 2) == [[1, 4], [0, 2, 3]]
    # Equal costs: by index, to the lowest rank of least load.
    assert shares([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]


def test_more_ranks_than_items_leaves_some_idle() -> None:
    assert shares([2.0, 1.0], 4) == [[0], [1], [], []]


def test_items_are_handed_out_and_not_their_indices() -> None:
    assert Ranks(0, 1).mine(["a", "b"], [1.0, 2.0]) == ["a", "b"]


@given(st.floats(width=64))
def test_gather_keeps_every_bit_of_a_float(value: float) -> None:
    (back,) = Ranks().gather({"value": [value]})
    if math.isnan(value):
        assert math.isnan(back["value"][0])
    else:
        assert struct.pack("d", back["value"][0]) == struct.pack("d", value)


def test_gather_refuses_what_is_not_plain_data() -> None:
    with pytest.raises(TypeError):
        Ranks().gather(object())


GATHERING = """
import json, math, sys
import torch
from fedmoe_core.simulation.process_group import open_ranks

with open_ranks(2, torch.device("cpu")) as ranks:
    # Sizes differ between ranks (padding), one value is longer than the other's, text is not ASCII.
    mine = {"rank": ranks.rank, "floats": [0.1 + 0.2, 5e-324, -0.0, 1e308 / 3, math.inf][: 3 + 2 * ranks.rank],
            "text": "\\u00e9\\u4e2d" * (1 + 50 * ranks.rank)}
    shares = ranks.mine(list("abcde"), [4, 7, 2, 5, 3])
    seen = ranks.gather({**mine, "share": shares})
    ranks.wait()
    print(json.dumps(seen), file=open(f"{sys.argv[1]}/{ranks.rank}.json", "w"))
"""


def test_inv10_two_processes_gather_the_same_exact_values_in_rank_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    script = tmp_path / "gathering.py"
    script.write_text(GATHERING)
    launch.run_ranks([str(tmp_path)], ranks=2, threads=1, program=(str(script),))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [part["rank"] for part in first] == [0, 1]
    sent = [0.1 + 0.2, 5e-324, -0.0, 1e308 / 3, math.inf]
    for part, count in zip(first, (3, 5), strict=True):
        assert [struct.pack("d", value) for value in part["floats"]] == [struct.pack("d", v) for v in sent[:count]]
    assert [len(part["text"]) for part in first] == [2, 102]
    assert [part["share"] for part in first] == [["b", "e"], ["a", "c", "d"]]


def test_ranks_other_than_the_processes_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"ranks=2 but 3 process"), open_ranks(2, CPU):
        pass
