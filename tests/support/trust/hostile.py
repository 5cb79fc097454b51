"""Hostile answers, generated: every field of an update with every wrong kind of value, and whole objects that lie.

Each case is a name and a function that makes the hostile answer of a good one. Values that a client may well send are
left out: what is left must be refused whatever the client has trained.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_core.budget.limits import Cost
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import Evaluation

Case = tuple[str, Callable[[ClientUpdate], Any]]
NAN, INF = math.nan, math.inf


class Trap:
    """Raises whatever one asks of it, its own name in an error included."""

    def __getattr__(self, name: str) -> Any:
        raise BoomError

    def __repr__(self) -> str:
        raise BoomError

    def __eq__(self, other: object) -> bool:
        raise BoomError

    __hash__ = None  # type: ignore[assignment]


class BoomError(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Whole(int):
    """Says 1 when it is checked, and something else when it is used."""

    def __le__(self, other: object) -> bool:
        return True

    def __ge__(self, other: object) -> bool:
        return True


class Real(float):
    """A float in name."""

    def __mul__(self, other: object) -> float:
        return NAN


class Text(str):
    """A text that equals every other."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class Names(dict[str, Any]):
    """Shows its keys to one reader and hides them from the next."""

    def __iter__(self) -> Iterator[str]:
        return iter(())


class Lying(Tensor):
    """A tensor that is finite whenever it is asked."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("isfinite", "aminmax"):
            return super().__torch_function__(torch.ones_like, types, args[:1], {})
        return super().__torch_function__(func, types, args, kwargs or {})


class Answer(ClientUpdate):
    """A subclass whose fields may be anything when they are read again."""

    @property
    def trusted(self) -> bool:
        return True


# By what they are not: a whole number, a number, a text, a table of numbers, a table of tensors.
STRANGE: dict[str, Any] = {
    "None": None,
    "bytes": b"1",
    "complex": 1 + 1j,
    "list": [1],
    "tuple": (1.0,),
    "set": {1},
    "object": object(),
    "class": int,
    "function": len,
    "date": datetime.datetime(2026, 1, 1),
    "decimal": decimal.Decimal(1),
    "fraction": fractions.Fraction(1, 2),
    "numpy int": np.int64(1),
    "numpy float": np.float64(0.5),
    "numpy bool": np.bool_(True),
    "array": np.ones(3),
    "tensor": torch.ones(()),
    "trap": Trap(),
    "own int": Whole(1),
    "own float": Real(0.5),
    "own text": Text("ok"),
    "endless int": 10**5000,
    "-1": -1,
    "-0.5": -0.5,
    "inf": INF,
    "-inf": -INF,
    "bool": True,
}
PLACES = ("client", "round", "samples", "steps", "cohort", "gate_weight", "sample_weight", "plan_id", "status")
PLACES += ("loss_first", "loss_last", "error", "alone")
FIT = {"gate_weight": (), "loss_first": ("-0.5",), "loss_last": ("-0.5",)}  # what a client may say there


def scalars() -> Iterator[Case]:
    """Fields beside the tensors, of every wrong type and range."""
    for name in PLACES:
        for word, value in STRANGE.items():
            if word not in FIT.get(name, ()):
                yield f"{name} = {word}", _with(**{name: value})
        for word, value in {"nan": NAN, "text": "one", "2^60": 1 << 60, "real": 1.5}.items():
            known = {
                "nan": ("loss_first", "loss_last"),
                "text": ("error", "alone"),
                "real": ("loss_first", "loss_last"),
            }
            if name not in known.get(word, ()):
                yield f"{name} = {word}", _with(**{name: value})
    yield "alone is endless", _with(alone="x" * 10**6)
    for status in ("", "OK", "refused", "late", "ok "):
        yield f"status = {status!r}", _with(status=status)
    for item in fields(Cost):
        for word, value in {**STRANGE, "nan": NAN, "text": "1", "1e31": 1e31}.items():
            yield f"cost.{item.name} = {word}", _part("cost", item.name, value)
    for word, value in STRANGE.items():
        yield f"cost = {word}", _with(cost=value)
    for item in fields(Evaluation):
        for word, value in {**STRANGE, "nan": NAN, "2^60": 1 << 60}.items():
            if not (item.name == "loss_sum" and word == "-0.5"):
                yield f"validation.{item.name} = {word}", _validation(item.name, value)
    yield "more right than asked", _with(validation=Evaluation(1.0, 3, 4))


def tables() -> Iterator[Case]:
    """Weights and statistics: arrays of other types and shapes, and of numbers that none can be."""
    for name in ("expert_weight_LE", "router_weight_LE"):
        for word, change in _arrays(NAN, INF, -INF, -0.1, 1.1, 1e300).items():
            yield f"{name}: {word}", _changed(name, change)
    for record in ("profile", "validation_profile"):
        for word, value in STRANGE.items():
            if word != "None":
                yield f"{record} = {word}", _with(**{record: value})
        for item in fields(ClientProfile):
            low = 1e31 if item.name == "taylor_LE" else -1e6
            bad = (NAN, INF, -INF, 1e300, low) if item.name != "held_LE" else ()
            for word, change in _arrays(*bad).items():
                yield f"{record}.{item.name}: {word}", _of_profile(record, item.name, change)
        yield f"{record} of experts that were not held", _of_profile(record, "held_LE", lambda old: ~old)
        yield f"{record}.held_LE as numbers", _of_profile(record, "held_LE", lambda old: old.astype(float))


def tensors() -> Iterator[Case]:
    """Deltas: each tensor of every wrong kind, missing, renamed, exchanged, and holders that lie."""
    kinds: dict[str, Callable[[Tensor], Any]] = {
        "nan": lambda t: _entry(t, NAN),
        "inf": lambda t: _entry(t, INF),
        "-inf": lambda t: _entry(t, -INF),
        "just above the bound": lambda t: _entry(t, 1.0001),
        "far below": lambda t: _entry(t, -3e38),
        "float64": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
        "float16": lambda t: t.half(),
        "bfloat16": lambda t: t.bfloat16(),
        "int64": lambda t: t.long(),
        "uint8": lambda t: t.to(torch.uint8),
        "bool": lambda t: t.bool(),
        "complex": lambda t: torch.complex(t, t),
        "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "no first axis": lambda t: t[0] if t.dim() else t.unsqueeze(0),
        "an axis more": lambda t: t.unsqueeze(0),
        "one row that broadcasts": lambda t: t.flatten()[:1].clone(),
        "a row more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t.repeat(2),
        "empty": lambda t: t.new_zeros(0),
        "endless by stride": lambda t: t.flatten()[:1].expand(1 << 40),
        "sparse": lambda t: t.to_sparse() if t.dim() else None,
        "meta": lambda t: t.to("meta"),
        "parameter": lambda t: nn.Parameter(t.clone()),
        "with a graph": lambda t: t.clone().requires_grad_() * 2,
        "own class": lambda t: t.clone().as_subclass(Lying),
        "array": lambda t: t.numpy().copy(),
        "list": lambda t: t.tolist(),
        "None": lambda t: None,
        "bytes": lambda t: t.numpy().tobytes(),
        "trap": lambda t: Trap(),
    }
    for place in range(8):
        for word, change in kinds.items():
            yield f"tensor {place}: {word}", _delta(place, change)
        yield f"tensor {place} missing", _deltas(place, lambda found, key: found.pop(key))
        yield f"tensor {place} twice", _deltas(place, lambda found, key: found.update({f"{key}.again": found[key]}))
        yield f"tensor {place} renamed", _deltas(place, lambda found, key: found.update({key.upper(): found.pop(key)}))
        yield f"tensor {place} under a number", _deltas(place, lambda found, key: found.update({3: found.pop(key)}))
    yield "a key of a path", _deltas(0, lambda found, key: found.update({"../../params": found[key]}))
    yield "an endless key", _deltas(0, lambda found, key: found.update({"k" * 10**6: found[key]}))
    yield "ten thousand keys", _deltas(0, lambda found, key: found.update({f"k{n}": found[key] for n in range(10_001)}))
    yield "no deltas", _with(deltas={})
    for word, holder in {"ordered": OrderedDict, "own dict": Names, "proxy": MappingProxyType, "items": list}.items():
        yield (
            f"deltas as {word}",
            lambda update, holder=holder: replace(
                update, deltas=holder(update.deltas.items() if holder is list else update.deltas)
            ),
        )
    for name in ("deltas", "private", "metrics"):
        for word, value in STRANGE.items():
            yield f"{name} = {word}", _with(**{name: value})
    for word, change in kinds.items():
        if word in ("nan", "inf", "-inf", "complex", "quantized", "sparse", "meta", "parameter", "with a graph"):
            yield (
                f"private: {word}",
                lambda update, change=change: replace(update, private={"x": change(torch.ones(2, 2))}),
            )
    for word in ("own class", "array", "list", "None", "bytes", "trap"):
        yield (
            f"private: {word}",
            lambda update, change=kinds[word]: replace(update, private={"x": change(torch.ones(2))}),
        )
    for word, value in {**STRANGE, "nan": NAN, "whole": 1, "text": "1"}.items():
        if word != "-0.5":
            yield f"metric = {word}", _with(metrics={"m": value})
    yield "a metric without a name", _with(metrics={3: 1.0})
    yield "endless metrics", _with(metrics={f"m{n}": 1.0 for n in range(10_001)})
    yield "private that fills the memory", _with(private={"x": torch.zeros(1).expand(1 << 40)})


def identities() -> Iterator[Case]:
    """Answers of other clients, rounds and plans, and objects that are no answer."""
    yield "the next client's name", lambda update: replace(update, client=update.client + 1)
    yield "a replay of the round before", lambda update: replace(update, round=update.round + 1)
    yield "an answer to another plan", lambda update: replace(update, plan_id=update.plan_id[::-1])
    yield "an answer to no plan", _with(plan_id="")
    yield "samples that are not its own", lambda update: replace(update, samples=update.samples + 1)
    yield "a weight that is not its own", lambda update: replace(update, sample_weight=update.sample_weight / 2)
    yield "a budget that was broken", lambda update: replace(update, cost=replace(update.cost, experts=1000))
    for word, value in {**STRANGE, "text": "ok", "number": 1}.items():
        yield f"{word} as an update", lambda update, value=value: value
    yield "fields as a dict", lambda update: {item.name: getattr(update, item.name) for item in fields(update)}
    yield "a look-alike", lambda update: SimpleNamespace(**{f.name: getattr(update, f.name) for f in fields(update)})
    yield "a subclass", lambda update: Answer(**{f.name: getattr(update, f.name) for f in fields(update)})
    for item in (item for item in fields(ClientUpdate) if item.default is MISSING):
        yield f"{item.name} deleted", lambda update, name=item.name: _without(update, name)


def failures() -> Iterator[Case]:
    """Answers that say they failed, which once skipped every check."""
    for name, make in [*scalars(), *tables(), *tensors()]:
        if not name.startswith("status"):
            yield f"failed, and {name}", lambda update, make=make: _failed(make(update))


def pairs(seed: int, count: int, cases: list[Case]) -> Iterator[Case]:
    """Two at once, drawn."""
    rng = np.random.default_rng(seed)
    while count:
        (first, one), (second, other) = (cases[int(rng.integers(len(cases)))] for _ in range(2))
        if first == second or (first.startswith("tensor") and second.startswith("tensor")):
            continue  # the second may undo the first
        yield f"{first}, and {second}", lambda update, one=one, other=other: _both(update, one, other)
        count -= 1


def every(seed: int, drawn: int) -> list[Case]:
    """All of them once, every fourth again as a failure, and ``drawn`` pairs."""
    single = [*scalars(), *tables(), *tensors(), *identities()]
    return [*single, *list(failures())[::4], *pairs(seed, drawn, single)]


def _with(**values: Any) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(update, **values)


def _part(record: str, name: str, value: Any) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(update, **{record: replace(getattr(update, record), **{name: value})})


def _validation(name: str, value: Any) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(update, validation=replace(Evaluation(1.0, 3, 2), **{name: value}))


def _changed(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(update, **{name: change(getattr(update, name))})


def _of_profile(record: str, name: str, change: Callable[[np.ndarray], Any]) -> Callable[[ClientUpdate], ClientUpdate]:
    def make(update: ClientUpdate) -> ClientUpdate:
        profile = update.profile
        assert profile is not None
        return replace(update, **{record: replace(profile, **{name: change(getattr(profile, name))})})

    return make


def _arrays(*numbers: float) -> dict[str, Callable[[np.ndarray], Any]]:
    """Wrong forms of an array, and the array with each of the numbers at its last place."""

    def entry(value: float) -> Callable[[np.ndarray], np.ndarray]:
        def change(old: np.ndarray) -> np.ndarray:
            new = old.astype(np.float64)
            new.flat[-1] = value
            return new

        return change

    return {
        "float32": lambda old: old.astype(np.float32),
        "whole numbers": lambda old: old.astype(np.int64),
        "complex": lambda old: old.astype(np.complex128),
        "objects": lambda old: old.astype(object),
        "texts": lambda old: old.astype("U8"),
        "dates": lambda old: old.astype(np.int64).astype("M8[s]"),
        "records": lambda old: np.zeros(old.shape, dtype=[("a", float)]),
        "a list": lambda old: old.tolist(),
        "a tensor": lambda old: torch.from_numpy(old.astype(np.float64)),
        "a matrix": lambda old: np.atleast_2d(old).view(np.matrix),
        "masked": lambda old: np.ma.masked_array(old, mask=True),
        "flat": lambda old: np.append(old.ravel(), 0.0),
        "an axis more": lambda old: old[None],
        "endless by stride": lambda old: np.broadcast_to(np.zeros(1), (1 << 20, 1 << 20)),
        "None": lambda old: None,
        **{f"{number}": entry(number) for number in numbers},
    }


def _entry(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def _delta(place: int, change: Callable[[Tensor], Any]) -> Callable[[ClientUpdate], ClientUpdate]:
    def make(update: ClientUpdate) -> ClientUpdate:
        key = sorted(update.deltas)[place % len(update.deltas)]
        return replace(update, deltas={**update.deltas, key: change(update.deltas[key])})

    return make


def _deltas(place: int, change: Callable[[dict[Any, Any], str], Any]) -> Callable[[ClientUpdate], ClientUpdate]:
    def make(update: ClientUpdate) -> ClientUpdate:
        found = dict(update.deltas)
        change(found, sorted(found)[place % len(found)])
        return replace(update, deltas=found)

    return make


def _without(update: ClientUpdate, name: str) -> ClientUpdate:
    bare = replace(update)
    object.__delattr__(bare, name)
    return bare


def _failed(answer: Any) -> Any:
    return replace(answer, status="failed", error="it says so") if type(answer) is ClientUpdate else answer


def _both(update: ClientUpdate, one: Callable[[ClientUpdate], Any], other: Callable[[ClientUpdate], Any]) -> Any:
    try:
        return other(one(update))
    except Exception:  # the second cannot be done to what the first left
        return one(update)
