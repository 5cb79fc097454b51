"""What moe_mlp refuses, each with the name of the argument that does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import FACTORS, problem

from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, SlotMap, moe_mlp


def _call(**changes: object) -> None:
    p = problem(5, 8, 6, 3, 2)
    t = {n: v.float() for n, v in p.tensors.items()}
    given = {"x_TH": t["x"], "routing": p.routing(t["s"]), "w_in": t["w_in"], "w_out": t["w_out"]} | changes
    moe_mlp(**given)


REFUSED = {
    "x is a vector": ({"x_TH": torch.zeros(8)}, "x_TH"),
    "x of integers": ({"x_TH": torch.zeros(5, 8, dtype=torch.int64)}, "x_TH"),
    "other tokens": ({"x_TH": torch.zeros(6, 8)}, "routing"),
    "mixed dtypes": ({"x_TH": torch.zeros(5, 8, dtype=torch.bfloat16)}, "w_in"),
    "no slot": ({"w_in": torch.zeros(0, 12, 8), "w_out": torch.zeros(0, 8, 6)}, "w_in"),
    "other slots": ({"w_in": torch.zeros(4, 12, 8), "w_out": torch.zeros(4, 8, 6)}, "w_in has 4 slots"),
    "slots that differ": ({"w_out": torch.zeros(4, 8, 6)}, "w_in|w_out"),
    "w_out turned": ({"w_out": torch.zeros(3, 6, 8)}, "w_out"),
    "w_in without its gate": ({"w_in": torch.zeros(3, 6, 8)}, "w_in"),
    "bias of another width": ({"bias_in": torch.zeros(3, 6)}, "bias_in"),
    "bias in another form": ({"bias_out": ExpertWeights(torch.zeros(3, 8))}, "w_in"),
    "unknown activation": ({"activation": "swish"}, "swiglu"),
    "triton": ({"backend": "triton"}, "triton"),
    "mask of another length": ({"trainable_B": torch.ones(4, dtype=torch.bool)}, "trainable_B"),
    "mask of integers": ({"trainable_B": torch.ones(3)}, "trainable_B"),
    "scores of another layer": ({"scores": ExpertScores(4)}, "scores"),
    "mask on another device": (
        {"trainable_B": torch.ones(3, dtype=torch.bool, device="meta")},
        "trainable_B is on meta",
    ),
    "scores on another device": ({"scores": ExpertScores(3, device="meta")}, "scores is on meta"),
    "weights on another device": ({"w_out": torch.zeros(3, 8, 6, device="meta")}, "w_out is torch.float32 on meta"),
    "frozen part on another device": (
        {
            "w_in": ExpertWeights(torch.zeros(1, 12, 8), torch.zeros(2, 12, 8, device="meta")),
            "w_out": ExpertWeights(torch.zeros(1, 8, 6), torch.zeros(2, 8, 6)),
        },
        "w_in's frozen part",
    ),
    "unknown backend": ({"backend": "cuda"}, "auto, cpu, triton, reference"),
    "scores by reference": ({"scores": ExpertScores(3), "backend": "reference"}, "scores"),
}


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_by_name(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _call(**changes)


ROUTINGS = {
    "weights of integers": ({"weights_TK": torch.zeros(5, 2, dtype=torch.int64)}, "weights_TK"),
    "weights elsewhere": ({"weights_TK": torch.zeros(5, 2, device="meta")}, "weights_TK is on meta"),
    "weights of other places": ({"weights_TK": torch.zeros(5, 3)}, "routing"),
    "rows in 32 bits": ({"rows_TK": torch.zeros(5, 2, dtype=torch.int32)}, "rows_TK"),
    "tokens of other places": ({"tokens_R": torch.zeros(11, dtype=torch.int64)}, "tokens_R"),
    "places elsewhere": ({"places_R": torch.zeros(10, dtype=torch.int64, device="meta")}, "places_R is on meta"),
    "bounds of other slots": ({"offsets_B1": torch.zeros(3, dtype=torch.int64)}, "offsets_B1"),
    "no slot": ({"offsets_B1": torch.zeros(1, dtype=torch.int64), "num_slots": 0}, "no slot"),
}


@pytest.mark.parametrize(("changes", "named"), ROUTINGS.values(), ids=ROUTINGS.keys())
def test_refuses_a_routing_record_that_does_not_fit(changes: dict, named: str) -> None:
    p = problem(5, 8, 6, 3, 2)
    with pytest.raises(ValueError, match=named):
        _call(routing=replace(p.routing(p.tensors["s"].float()), **changes))


@pytest.mark.parametrize("name", ["scale", "base_of_slot_B"])
def test_refuses_adapters_from_another_device(name: str) -> None:
    p = problem(5, 8, 6, 3, 2, rank=2)
    given = {"scale": torch.ones(3), "base_of_slot_B": torch.arange(3)}
    lora = ExpertLora(*(p.tensors[n].float() for n in FACTORS), **given | {name: given[name].to("meta")})
    with pytest.raises(ValueError, match=rf"lora\.{name} is on meta"):
        _call(lora=lora)


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (2, 8)])
def test_refuses_adapters_without_a_slot_or_a_rank(shape: tuple[int, ...]) -> None:
    factor = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"lora\.a_in"):
        _call(lora=ExpertLora(factor, factor, factor, factor))


@pytest.mark.parametrize("rows_per_slot", [0, -3])
def test_refuses_rows_per_slot_below_one(rows_per_slot: int) -> None:
    with pytest.raises(ValueError, match="rows_per_slot"):
        SlotMap(torch.arange(3), 3, rows_per_slot)
