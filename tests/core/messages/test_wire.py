"""Messages as bytes: what was put in comes out bit for bit, and of the model no more travels than the plan permits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hand_made import plan_for, population, result_for
from wire_cases import put_together, taken_apart

from fedmoe_core.messages.measure import Measure
from fedmoe_core.messages.plan import Extras, Reads
from fedmoe_core.messages.profile import profile_arrays
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.wire.answer import answer_bytes, read_answer
from fedmoe_core.messages.wire.base import Base, base_params, expert_digest, places_of, read_base
from fedmoe_core.messages.wire.codes import coded, decoded
from fedmoe_core.messages.wire.envelope import WireError, seal, unseal
from fedmoe_core.messages.wire.greeting import Description, description_bytes, read_description
from fedmoe_core.messages.wire.task import Setting, cannot_travel, read_task, task_bytes
from fedmoe_core.model.spec import ParamSpec
from fedmoe_kernels.quantized import Quantized

LARGEST = 1 << 24


@dataclass(frozen=True, eq=False)
class Wish:
    """One of every kind of field that can travel."""

    count: int = 3
    share: float = 0.1
    word: Literal["a", "b"] = "a"
    places: tuple[tuple[int, int], ...] = ((0, 1), (1, 3))
    maybe: float | None = None
    sure: bool = True
    mask_LE: np.ndarray = field(default_factory=lambda: np.eye(2, 4, dtype=bool))
    row: torch.Tensor = field(default_factory=lambda: torch.tensor([1.0, -0.0]).bfloat16())
    measures: ClassVar[dict[str, Measure]] = {"seen": Measure("LE")}
    reads: ClassVar[Reads] = "permitted"

    def __call__(self, context: Any) -> dict[str, torch.Tensor]:
        return {}


def wishing(**wishes: Any) -> bytes:
    return sent(replace(plan_for(0), extras=Extras(**wishes)))


def told(data: bytes, change: Any) -> bytes:
    """The same task with its head and tensors changed."""
    head, tensors = taken_apart(data)
    return put_together(change(head, tensors) or head, tensors)


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
    assert cannot_travel(asking) == f"{wish}, an object of function, which its wishes do not declare"
    object.__setattr__(asking, "extras", Own())
    assert "class of its own (Own)" in cannot_travel(asking)


def test_a_wish_comes_back_as_it_was() -> None:
    wish = Wish(maybe=0.1 + 0.2)
    back = read_task(wishing(after=wish), largest=LARGEST, declared=lambda config: [Wish]).plan.extras
    assert (back.before, back.aux, back.per_batch) == (None, None, None)
    found = back.after
    assert type(found) is Wish
    assert (found.count, found.share, found.word, found.maybe, found.sure) == (3, 0.1, "a", 0.1 + 0.2, True)
    assert found.places == wish.places
    np.testing.assert_array_equal(found.mask_LE, wish.mask_LE)
    assert found.mask_LE.dtype == bool
    assert torch.equal(found.row.view(torch.int16), wish.row.view(torch.int16))


def test_a_wish_that_is_not_data_is_refused_with_its_field() -> None:
    @dataclass(frozen=True)
    class Live:
        helper: object = None

    @dataclass
    class Loose:
        count: int = 1

    for wish, wishes, said in (
        (Wish(), [], "after, an object of Wish, which its wishes do not declare"),
        (Wish(share=math.nan), [Wish], "after, whose Wish.share is not finite"),
        (Wish(share=1), [Wish], "after, whose Wish.share is a int, not float"),
        (Wish(count=np.int64(3)), [Wish], "after, whose Wish.count is a int64, not int"),
        (Wish(count=True), [Wish], "after, whose Wish.count is a bool, not int"),
        (Wish(word="c"), [Wish], "after, whose Wish.word is 'c', not one of 'a', 'b'"),
        (Wish(places=[(0, 1)]), [Wish], "after, whose Wish.places is a list, not a tuple"),
        (Wish(places=((0, 1, 2),)), [Wish], "after, whose Wish.places has an entry that has 3 entries, not 2"),
        (Wish(mask_LE=np.array([object()])), [Wish], "after, whose Wish.mask_LE is an array of object"),
        (Wish(mask_LE=np.array([math.inf])), [Wish], "after, whose Wish.mask_LE holds NaN or infinity"),
        (Live(), [Live], "after, whose Live.helper is declared as <class 'object'>, which is not data"),
        (Loose(), [Loose], "after, an object of Loose, which is not a frozen dataclass"),
    ):
        assert cannot_travel(replace(plan_for(0), extras=Extras(after=wish)), wishes) == said
    assert cannot_travel(replace(plan_for(0), extras=Extras(after=Wish())), [Wish]) == ""


def _field(name: str, value: Any) -> Any:
    return lambda head, tensors: head["plan"]["wishes"]["after"]["fields"].update({name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, t: h["plan"]["wishes"]["after"].update(name="os.system"), "asks in after for 'os.system', which"),
        (lambda h, t: h["plan"]["wishes"]["after"].update(name="ExpertPlan"), "asks in after for 'ExpertPlan'"),
        (lambda h, t: h["plan"]["wishes"].update(rows=h["plan"]["wishes"]["after"]), "asks for 'rows', which is not"),
        (lambda h, t: h["plan"]["wishes"]["after"].update(module="os"), "has a head of another form"),
        (_field("count", "3"), "Wish.count that is a str, not int"),
        (_field("count", 3.0), "Wish.count that is a float, not int"),
        (_field("count", True), "Wish.count that is a bool, not int"),
        (_field("share", None), "Wish.share that is a NoneType, not float"),
        (_field("share", math.nan), "has a head of another form"),
        (_field("word", "c"), "Wish.word that is 'c', not one of"),
        (_field("places", [[0, 1], [1, "x"]]), "Wish.places that has an entry that has an entry that is a str"),
        (_field("places", {"a": 1}), "Wish.places that is a dict, not a tuple"),
        (_field("sure", 1), "Wish.sure that is a int, not bool"),
        (_field("code", "import os"), "Wish.code, which is not a field"),
        (_field("mask_LE", [[1, 2]]), "Wish.mask_LE, which is not a field"),
        (lambda h, t: h["plan"]["wishes"]["after"]["fields"].pop("count") and None, "has no Wish.count"),
        (lambda h, t: t.__delitem__("wish/after/mask_LE"), "no table Wish.mask_LE"),
        (lambda h, t: t.update({"wish/after/mask_LE": torch.zeros(3, 4)}), r"Wish.mask_LE of shape \(3, 4\), not"),
        (lambda h, t: t.update({"wish/after/mask_LE": torch.full((2, 4), math.nan)}), "else than finite numbers"),
        (lambda h, t: t.update({"wish/after/mask_LE": torch.zeros(2, 4).bfloat16()}), "of bfloat16, which numpy"),
        (lambda h, t: t.update({"wish/aux/x": torch.zeros(1)}), "the table wish/aux/x, which no wish needs"),
    ],
)
def test_a_task_with_a_wish_of_another_form_is_refused_by_name(change: Any, said: str) -> None:
    with pytest.raises(WireError, match=said):
        read_task(told(wishing(after=Wish()), change), largest=LARGEST, declared=lambda config: [Wish])


def test_a_class_that_refuses_its_fields_is_told_in_its_own_words() -> None:
    @dataclass(frozen=True)
    class Strict:
        count: int

        def __post_init__(self) -> None:
            if self.count < 1:
                raise ValueError("count is below 1")

    def lower(head: Any, tensors: Any) -> None:
        head["plan"]["wishes"]["aux"]["fields"]["count"] = 0

    data = told(wishing(aux=Strict(2)), lower)
    with pytest.raises(WireError, match=r"a Strict that cannot be \(count is below 1\)"):
        read_task(data, largest=LARGEST, declared=lambda config: [Strict])


def test_a_base_that_the_client_has_does_not_travel_and_no_other_is_believed() -> None:
    plan = replace(plan_for(0), extras=Extras(lora_rank=1, cached_LE=plan_for(0).permitted_LE))
    spec, params, shelf = setting().spec, state(), dict[str, Any]()
    specs = base_params(spec, plan)
    assert {param.key for param in specs} == {key for key in params if key.endswith(("w_in", "w_out"))}
    digests = {place: expert_digest(specs, place, plan, params) for place in places_of(plan.permitted_LE)}

    def task(omitted_LE: np.ndarray) -> Any:
        base = Base(omitted_LE, digests)
        data = task_bytes(setting(), plan, params, costs=population().costs, with_trunk=True, trunk="", base=base)
        return data, read_task(data, largest=LARGEST)

    data, asked = task(np.zeros_like(plan.permitted_LE))
    rows, new = read_base(asked.sent, asked.plan, spec, shelf.get)
    assert len(new) == plan.permitted_LE.sum()
    shelf |= new
    less, again = task(plan.permitted_LE)
    assert len(less) < len(data) - sum(params[param.key][0].nbytes for param in specs)
    found, nothing = read_base(again.sent, again.plan, spec, shelf.get)
    assert not nothing
    whole = again.params(spec, again.trunk, found)
    for param in specs:
        held = torch.from_numpy(plan.permitted_LE[param.layer])
        assert torch.equal(whole[param.key][held], params[param.key][held])
        assert torch.equal(found[param.key], rows[param.key])
    shelf.popitem()
    assert read_base(again.sent, again.plan, spec, shelf.get) == (None, {})
    asked.sent["experts/moe.0.w_in"][0, 0, 0] += 1
    with pytest.raises(WireError, match="not the one it names"):
        read_base(asked.sent, asked.plan, spec, shelf.get)
    del again.sent["base/digests"]
    with pytest.raises(WireError, match="base/digests is missing"):
        read_base(again.sent, again.plan, spec, shelf.get)


def test_a_probe_that_reads_all_experts_is_sent_them() -> None:
    @dataclass(frozen=True)
    class Reader(Wish):
        reads: ClassVar[Reads] = "all"

    data = wishing(before=Reader())
    asked = read_task(data, largest=LARGEST, declared=lambda config: [Reader])
    found = asked.params(setting().spec, asked.trunk)
    assert all(torch.equal(found[key], tensor) for key, tensor in state().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_travelled_in_four_bits_rounds_to_the_same_codes_and_scales(dtype: torch.dtype) -> None:
    param = ParamSpec("moe.0.w_in", "expert", (9, 32, 96), dtype, 0)
    rows = torch.randn(9, 32, 96, generator=torch.Generator().manual_seed(1))
    rows *= 10.0 ** torch.arange(-4, 5)[:, None, None]
    rows[3, :8] = 0
    rows[4] *= -1
    rows = rows.to(dtype)
    sent = coded(param, rows)
    assert sum(tensor.nbytes for tensor in sent.values()) < rows.nbytes * (0.2 if dtype == torch.float32 else 0.3)
    found = decoded(param, sent, 9)
    wanted, again = Quantized.of(rows, "int4"), Quantized.of(found, "int4")
    assert found.dtype == dtype
    assert torch.equal(again.codes, wanted.codes)
    assert torch.equal(again.scale, wanted.scale)
    for name, tensor in (("codes", sent["codes/moe.0.w_in"].to(torch.int8)), ("most", sent["most/moe.0.w_in"][:, :5])):
        with pytest.raises(WireError, match=r"codes of moe\.0\.w_in"):
            decoded(param, {**sent, f"{name}/moe.0.w_in": tensor}, 9)
    with pytest.raises(WireError, match=r"codes of moe\.0\.w_in"):
        decoded(param, sent, 8)


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
