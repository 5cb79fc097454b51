"""Messages as bytes: what was put in comes out bit for bit, and of the model no more travels than the plan permits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import plan_for, population, result_for

from fedmoe_core.messages.plan import Extras
from fedmoe_core.messages.profile import profile_arrays
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.wire.answer import answer_bytes, read_answer
from fedmoe_core.messages.wire.envelope import WireError, seal, unseal
from fedmoe_core.messages.wire.greeting import Description, description_bytes, read_description
from fedmoe_core.messages.wire.task import Setting, cannot_travel, read_task, task_bytes

LARGEST = 1 << 24


def state(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A tensor for each of the model's, no two numbers alike."""
    generator = torch.Generator().manual_seed(0)
    return {p.key: torch.randn(p.shape, generator=generator).to(dtype) for p in population().spec.params}


def setting(dtype: torch.dtype = torch.float32) -> Setting:
    spec = population().spec
    spec = replace(spec, params=tuple(replace(param, dtype=dtype) for param in spec.params))
    learning = frozenset(param.key for param in spec.trained(train_dense=False))
    return Setting("a run", "rounds = 1", "words", spec, learning)


def sent(plan: Any, dtype: torch.dtype = torch.float32, *, with_trunk: bool = True) -> bytes:
    costs = population().costs
    return task_bytes(setting(dtype), plan, state(dtype), costs=costs, with_trunk=with_trunk, trunk="")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_task_brings_the_plan_and_what_it_permits_bit_for_bit(dtype: torch.dtype) -> None:
    plan, params = plan_for(0), state(dtype)
    asked = read_task(sent(plan, dtype), largest=LARGEST)
    assert asked.plan.id == plan.id
    assert (asked.plan.budget, asked.plan.predicted, asked.plan.seed) == (plan.budget, plan.predicted, plan.seed)
    assert asked.head.costs == population().costs
    found = asked.params(setting(dtype).spec, asked.trunk)
    for param in population().spec.params:
        assert found[param.key].dtype == dtype
        if param.kind == "expert":
            held = torch.from_numpy(plan.permitted_LE[param.layer])
            assert torch.equal(found[param.key][held], params[param.key][held])
            assert not found[param.key][~held].any()
        else:
            assert torch.equal(found[param.key], params[param.key])


def test_an_expert_that_is_not_permitted_does_not_travel() -> None:
    plan = plan_for(0)
    assert not plan.permitted_LE.all()
    data, params = sent(plan), state()
    for param in population().spec.params:
        if param.kind == "expert":
            for expert in np.flatnonzero(~plan.permitted_LE[param.layer]):
                assert params[param.key][expert].numpy().tobytes() not in data
            for expert in np.flatnonzero(plan.permitted_LE[param.layer]):
                assert params[param.key][expert].numpy().tobytes() in data


def test_rows_of_the_clients_own_travel_instead_of_the_router() -> None:
    plan, params = plan_for(0), state()
    router = next(param for param in population().spec.params if param.kind == "router")
    own = {expert: torch.full(router.shape[1:], float(expert)) for expert in range(router.shape[0])}
    personal = replace(plan, extras=Extras(rows={router.key: own}))
    data = sent(personal)
    assert params[router.key].numpy().tobytes() not in data
    back = read_task(data, largest=LARGEST).plan.extras.rows[router.key]
    assert {expert: row.tolist() for expert, row in back.items()} == {e: row.tolist() for e, row in own.items()}


def test_a_task_that_lies_or_lacks_something_is_refused() -> None:
    asked = read_task(sent(plan_for(0), with_trunk=False), largest=LARGEST)
    with pytest.raises(WireError, match="lacks dense"):
        asked.params(setting().spec, {})
    with pytest.raises(WireError, match=r"not torch\.bfloat16"):
        read_task(sent(plan_for(0)), largest=LARGEST).params(setting(torch.bfloat16).spec, asked.trunk)
    data = sent(plan_for(0))
    with pytest.raises(WireError, match="are the most"):
        read_task(data, largest=len(data) - 1)


@pytest.mark.parametrize("wish", ["before", "after", "aux", "per_batch"])
def test_a_plan_that_asks_for_code_cannot_travel(wish: str) -> None:
    class Own(Extras):
        """Wishes of another class."""

    assert cannot_travel(plan_for(0)) == ""
    asking = replace(plan_for(0))
    object.__setattr__(asking, "extras", replace(Extras(), **{wish: lambda *_: None}))
    assert cannot_travel(asking) == wish
    object.__setattr__(asking, "extras", Own())
    assert "class of its own (Own)" in cannot_travel(asking)


def test_an_answer_comes_back_bit_for_bit() -> None:
    plan, result = plan_for(0), result_for(0)
    back = read_answer(answer_bytes(plan, result, "a run"), plan, "a run", largest=LARGEST)
    assert isinstance(back, LocalResult)
    assert (back.cost, back.losses) == (result.cost, result.losses)
    assert back.deltas.keys() == result.deltas.keys()
    assert all(torch.equal(back.deltas[key], result.deltas[key]) for key in result.deltas)
    for name, array in profile_arrays(result.profile).items():
        np.testing.assert_array_equal(getattr(back.profile, name), array)
    failed = read_answer(answer_bytes(plan, LocalFailure(result.cost, "no"), "a run"), plan, "a run", largest=LARGEST)
    assert failed == LocalFailure(result.cost, "no")


def test_inv11_an_answer_of_another_run_round_or_client_is_refused() -> None:
    plan, data = plan_for(0), answer_bytes(plan_for(0), result_for(0), "a run")
    for asked, session, said in (
        (plan, "another", "for run"),
        (replace(plan, round=plan.round + 1), "a run", "for round"),
        (replace(plan, client=plan.client + 1), "a run", "for client"),
        (replace(plan, seed=plan.seed + 1), "a run", "for plan"),
    ):
        with pytest.raises(WireError, match=said):
            read_answer(data, asked, session, largest=LARGEST)


def test_numbers_of_numpy_travel_as_numbers_and_text_stays_bounded() -> None:
    told = Description("a run", 1, "site", tokens=int(np.int64(5)), counts=[1, 2])
    assert read_description(description_bytes(told), "a run") == told
    with pytest.raises(WireError, match="another form"):
        read_description(seal({**_fields(told), "name": "x" * 301}, {}), "a run")
    with pytest.raises(WireError, match="another form"):
        read_description(seal({**_fields(told), "client": np.int64(-1)}, {}), "a run")
    with pytest.raises(WireError, match="for run"):
        read_description(description_bytes(told), "another")
    assert unseal(seal(told, {"half": torch.ones(2).bfloat16()}), Description, largest=LARGEST)[1]["half"].dtype == (
        torch.bfloat16
    )


def _fields(told: Description) -> dict[str, Any]:
    return {name: getattr(told, name) for name in told.__struct_fields__}
