"""What a plan asks for besides training, as data: a wish is named, its fields travel, and the device makes it again.

A name means one of the classes that the system of the run declares (``Algorithm.wishes``), so a message can name
nothing else: never a module, never code.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import torch
from torch import Tensor

from fedmoe_core.messages.plan import Extras
from fedmoe_core.messages.wire.envelope import WireError, by_prefix

SLOTS = ("before", "after", "aux", "per_batch")  # the fields of ``Extras`` that hold a wish
KINDS = "biuf"  # numpy's: truths, whole numbers and floating ones


class WishHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wish in words and numbers; its arrays are tensors of the message, ``wish/SLOT/FIELD``.

    Attributes:
        name: of its class.
        fields: numbers, texts, truths, null and lists of them, by name.
    """

    name: str
    fields: dict[str, Any]


def unfit(extras: Extras, wishes: Sequence[type]) -> str:
    """Return in words which wish cannot travel and why; empty where all can.

    Args:
        extras: of a plan.
        wishes: classes that the system declares.
    """
    for slot in SLOTS:
        wish = getattr(extras, slot)
        if wish is None:
            continue
        if fault := _unknown(type(wish), wishes):
            return f"{slot}, {fault}"
        for field, hint in _hints(type(wish)).items():
            value = getattr(wish, field)
            if fault := _strange(value, hint) if hint not in (np.ndarray, Tensor) else _no_table(value, hint):
                return f"{slot}, whose {type(wish).__name__}.{field} {fault}"
    return ""


def told_wishes(extras: Extras) -> dict[str, WishHead]:
    """Return the wishes of a plan that can travel, by slot."""
    found = {}
    for slot in SLOTS:
        if (wish := getattr(extras, slot)) is not None:
            plain = [field for field, hint in _hints(type(wish)).items() if hint not in (np.ndarray, Tensor)]
            found[slot] = WishHead(type(wish).__name__, {field: getattr(wish, field) for field in plain})
    return found


def tables_of(extras: Extras) -> dict[str, Tensor]:
    """Return the arrays of a plan's wishes, as ``wish/SLOT/FIELD``."""
    found = {}
    for slot in SLOTS:
        if (wish := getattr(extras, slot)) is not None:
            for field, hint in _hints(type(wish)).items():
                if hint in (np.ndarray, Tensor):
                    table = getattr(wish, field)
                    found[f"wish/{slot}/{field}"] = torch.from_numpy(table) if hint is np.ndarray else table
    return found


def made_again(
    told: Mapping[str, WishHead],
    tensors: Mapping[str, Tensor],
    wishes: Sequence[type],
    shape_LE: tuple[int, ...],
) -> dict[str, Any]:
    """Make the wishes of a task again, by slot.

    Args:
        told: by slot.
        tensors: of the message.
        wishes: classes that the system declares here.
        shape_LE: (L, E); a field whose name ends in ``_LE`` has this shape.

    Raises:
        WireError: an unknown slot or name, a field that is missing, unknown or of another type, or a number that is not
            finite.
    """
    known, tables = {wish.__name__: wish for wish in wishes}, by_prefix(tensors, "wish")
    found = {}
    for slot, head in told.items():
        if slot not in SLOTS:
            raise WireError(f"a task asks for {slot!r:.40}, which is not a wish")
        if head.name not in known:
            raise WireError(f"a task asks in {slot} for {head.name!r:.40}, which this system does not declare")
        kind = known[head.name]
        if fault := _unknown(kind, wishes):
            raise WireError(f"a task asks for {fault}")
        hints, values = _hints(kind), dict[str, Any]()
        for field, hint in hints.items():
            where = f"{head.name}.{field}"
            if hint in (np.ndarray, Tensor):
                values[field] = _table(tables.get(f"{slot}/{field}"), hint, where, shape_LE)
                continue
            if field not in head.fields:
                raise WireError(f"a task has no {where}")
            values[field] = _tupled(head.fields[field])
            if fault := _strange(values[field], hint):
                raise WireError(f"a task has a {where} that {fault}")
        for field in head.fields:
            if hints.get(field, Tensor) in (np.ndarray, Tensor):
                raise WireError(f"a task has {head.name}.{field:.40}, which is not a field")
        try:
            found[slot] = kind(**values)
        except Exception as error:  # what its own __post_init__ says
            raise WireError(f"a task has a {head.name} that cannot be ({error!s:.120})") from None
    named = {f"{slot}/{field}" for slot, head in told.items() for field in _hints(known[head.name])}
    for name in tables.keys() - named:
        raise WireError(f"a task has the table wish/{name:.80}, which no wish needs")
    return found


def _unknown(kind: type, wishes: Sequence[type]) -> str:
    """Why a class is not a wish that can travel; empty where it is one."""
    name = kind.__name__
    if kind not in wishes:
        return f"an object of {name}, which its wishes do not declare"
    if [wish.__name__ for wish in wishes].count(name) > 1:
        return f"an object of {name}, and two of its wishes are called so"
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"an object of {name}, which is not a frozen dataclass"
    return ""


def _hints(kind: type) -> dict[str, Any]:
    """The type of every field by name."""
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind) if item.init}


def _strange(value: object, hint: Any) -> str:
    """Say why a value is not of a type, compared exactly; empty where it is."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint in (bool, int, float, str, type(None)):
        if type(value) is not hint:
            return f"is a {type(value).__name__}, not {hint.__name__}"
        return "is not finite" if type(value) is float and not math.isfinite(value) else ""
    if origin is Literal:
        fits = any(type(value) is type(word) and value == word for word in inside)
        return "" if fits else f"is {value!r:.40}, not one of {', '.join(map(repr, inside))}"
    if origin in (Union, types.UnionType):
        faults = [_strange(value, one) for one in inside]
        return "" if "" in faults else faults[0]
    if origin is tuple:
        if type(value) is not tuple:
            return f"is a {type(value).__name__}, not a tuple"
        each = [inside[0]] * len(value) if len(inside) == 2 and inside[1] is Ellipsis else list(inside)
        if len(each) != len(value):
            return f"has {len(value)} entries, not {len(each)}"
        return next((f"has an entry that {f}" for v, h in zip(value, each, strict=True) if (f := _strange(v, h))), "")
    return f"is declared as {hint}, which is not data"


def _no_table(value: object, hint: type) -> str:
    if type(value) is not hint:
        return f"is a {type(value).__name__}, not {hint.__name__}"
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in KINDS or value.dtype.itemsize > 8:
            return f"is an array of {value.dtype}"
        value = torch.from_numpy(np.ascontiguousarray(value))
    assert isinstance(value, Tensor)
    return "" if bool(value.isfinite().all()) else "holds NaN or infinity"


def _table(tensor: Tensor | None, hint: type, where: str, shape_LE: tuple[int, ...]) -> np.ndarray | Tensor:
    if tensor is None:
        raise WireError(f"a task has no table {where}")
    if where.endswith("_LE") and tuple(tensor.shape) != shape_LE:
        raise WireError(f"a task has a table {where} of shape {tuple(tensor.shape)}, not {shape_LE}")
    if tensor.is_complex() or not bool(tensor.isfinite().all()):
        raise WireError(f"a task has a table {where} that holds something else than finite numbers")
    if hint is Tensor:
        return tensor
    if tensor.dtype is torch.bfloat16:
        raise WireError(f"a task has a table {where} of bfloat16, which numpy does not know")
    return np.asarray(tensor.numpy().copy())


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
