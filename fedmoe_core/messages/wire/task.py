"""The server's message to one client: its plan as data, and the tensors that the plan permits it to have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.tensor_key import DENSE, TensorKey
from fedmoe_core.budget.cost_model import CostModel, Mode
from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.layer.state import MATRICES, STEERING
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.wire.base import Base, base_params, base_tensors
from fedmoe_core.messages.wire.codes import coded, decoded
from fedmoe_core.messages.wire.envelope import WireError, array_of, by_prefix, seal, unseal, with_prefix
from fedmoe_core.messages.wire.wishes import WishHead, made_again, tables_of, told_wishes, unfit
from fedmoe_core.model.spec import ModelSpec, ParamSpec, model_hash

# Classes of wishes that a system declares, by the configuration that names it.
Declared = Callable[[str], Sequence[type]]


class PlanHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As ``ExpertPlan`` and ``Extras``, without masks and rows, which are tensors."""

    client: int
    round: int
    top_k: int
    local_steps: int
    seed: int
    budget: Budget
    predicted: Cost
    first_participation: bool
    mode: Mode
    plan_id: str
    surcharge: Cost
    validate: bool
    keeps: list[str]
    train_router: bool
    lora_rank: int | None
    out_scale_L: list[float] | None
    wishes: dict[str, WishHead]


class TaskHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a task says in words and numbers.

    Attributes:
        session: the run; the answer has to name it.
        config: the configuration of the run, as TOML.
        vocabulary: digest of the tokenizer that the plan was made for.
        trunk: digest of the tensors that never train here; empty where there are none.
        costs: the cost model by which the client counts its operations.
        plan: what is asked.
    """

    session: str
    config: str
    vocabulary: str
    trunk: str
    costs: CostModel
    plan: PlanHead


@dataclass(frozen=True)
class Setting:
    """What all tasks of a run have in common.

    Attributes:
        session, config, vocabulary: as ``TaskHead``.
        spec: the tensors of the model.
        learning: keys of those that may train in this run.
    """

    session: str
    config: str
    vocabulary: str
    spec: ModelSpec
    learning: frozenset[str]

    def trunk(self, params: Mapping[str, Tensor], plan: ExpertPlan) -> dict[str, Tensor]:
        """Return the tensors that a client needs once and keeps."""
        wanted = [param.key for param in self.spec.params if travel_of(param, plan, self.learning) == "trunk"]
        return {key: params[key] for key in wanted}


@dataclass(frozen=True)
class Asked:
    """A task as its client reads it.

    Attributes:
        head: in words and numbers.
        plan: with the ``id`` of the server's.
        sent: tensors by part and key.
    """

    head: TaskHead
    plan: ExpertPlan
    sent: Mapping[str, Tensor]

    @property
    def trunk(self) -> dict[str, Tensor]:
        """The trunk that travelled with it; empty where the client should have it."""
        return by_prefix(self.sent, "trunk")

    def params(
        self, spec: ModelSpec, trunk: Mapping[str, Tensor], base: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """Return a whole state for ``ModelAdapter.configure``.

        Experts that are not permitted are zero in it, unless a probe reads all of them.

        Args:
            spec: of the client's own model.
            trunk: as it was sent, now or before.
            base: of experts under adapters, by key, as ``read_base`` gives it.

        Raises:
            WireError: a tensor is missing, or has another shape or dtype than the client's model.
        """
        whole = by_prefix(self.sent, "whole") | dict(trunk)
        rows, others = by_prefix(self.sent, "experts") | dict(base), by_prefix(self.sent, "others")
        params = {}
        for param in spec.params:
            if param.layer != DENSE and param.key in rows:
                permitted = np.flatnonzero(self.plan.permitted_LE[param.layer])
                _check(param, rows[param.key], (len(permitted), *param.shape[1:]))
                params[param.key] = _nothing(param)
                params[param.key][torch.from_numpy(permitted)] = rows[param.key]
                absent = np.flatnonzero(~self.plan.permitted_LE[param.layer])
                if self.plan.extras.reads == "int4" and param.name in MATRICES:
                    others[param.key] = decoded(param, self.sent, len(absent))
                if self.plan.extras.reads != "permitted":
                    _check(param, others.get(param.key), (len(absent), *param.shape[1:]))
                    params[param.key][torch.from_numpy(absent)] = others[param.key]
            elif param.key in whole:
                _check(param, whole[param.key], tuple(param.shape))
                params[param.key] = whole[param.key]
            elif covers(self.plan, param):
                params[param.key] = _nothing(param)  # its own rows stand in for all of it
            else:
                raise WireError(f"a task lacks {param.key}, which this model has; use one model on both sides")
        return params


def travel_of(param: ParamSpec, plan: ExpertPlan, learning: frozenset[str]) -> str:
    """Tell how a tensor of the model travels with a plan.

    Returns:
        "experts": the rows of permitted experts; "whole"; "trunk": once, then the client has it; "own": the plan's own
        rows stand in for it.
    """
    if param.layer == DENSE:
        return "whole" if param.key in learning else "trunk"
    if param.name in STEERING:
        if "router" in plan.extras.keeps:
            return "trunk"
        return "own" if covers(plan, param) else "whole"
    return "trunk" if param.name == "correction_bias" else "experts"


def covers(plan: ExpertPlan, param: ParamSpec) -> bool:
    """Tell whether the plan has rows of its own for every expert of a router."""
    return param.name in STEERING and len(plan.extras.rows.get(param.key, ())) == plan.permitted_LE.shape[1]


def cannot_travel(plan: ExpertPlan, wishes: Sequence[type] = ()) -> str:
    """Return what a plan asks for that is not data; empty where it can travel.

    Args:
        plan: of any system.
        wishes: classes that its system declares.
    """
    extras = plan.extras
    if type(extras) is not Extras:
        return f"wishes of a class of its own ({type(extras).__name__})"
    return unfit(extras, wishes)


def task_bytes(
    setting: Setting,
    plan: ExpertPlan,
    params: Mapping[str, Tensor],
    *,
    costs: CostModel,
    with_trunk: bool,
    trunk: str,
    base: Base | None = None,
) -> bytes:
    """Put a plan and what it permits into bytes.

    Args:
        setting: of the run.
        plan: of data alone (``cannot_travel``).
        params: the global model.
        costs: as ``TaskHead``.
        with_trunk: whether the trunk goes along.
        trunk: its digest.
        base: of experts under adapters, where the plan lets the client keep it.
    """
    extras, names = plan.extras, {item.name for item in fields(ExpertPlan)} & {*PlanHead.__struct_fields__}
    scales = None if extras.out_scale_L is None else list(extras.out_scale_L)
    wishes: dict[str, Any] = {"keeps": sorted(extras.keeps), "out_scale_L": scales, "wishes": told_wishes(extras)}
    wishes |= {name: getattr(extras, name) for name in ("surcharge", "validate", "train_router", "lora_rank")}
    own = {name: getattr(plan, name) for name in names}
    told = PlanHead(plan_id=plan.id, **wishes, **own)
    tensors = {
        "mask/permitted": torch.from_numpy(plan.permitted_LE),
        "mask/trainable": torch.from_numpy(plan.trainable_LE),
    }
    if extras.alias_LE is not None:
        tensors["mask/alias"] = torch.from_numpy(extras.alias_LE.astype(np.int64))
    if extras.cached_LE is not None:
        tensors["mask/cached"] = torch.from_numpy(extras.cached_LE)
    kept = {} if base is None else {param.key: param for param in base_params(setting.spec, plan)}
    if base is not None and kept:
        tensors |= base_tensors(base, tuple(kept.values()), plan, params)
    tensors |= tables_of(extras)
    for key, rows in extras.rows.items():
        if key in kept or not rows:
            continue
        tensors[f"rows_of/{key}"] = torch.tensor(list(rows), dtype=torch.int64)
        tensors[f"rows/{key}"] = torch.stack([rows[expert] for expert in rows])
    for param in setting.spec.params:
        how = travel_of(param, plan, setting.learning)
        if how == "experts":
            held_E, whole = torch.from_numpy(plan.permitted_LE[param.layer]), params[param.key]
            if param.key not in kept:
                tensors[f"experts/{param.key}"] = whole[held_E.to(whole.device)]
            if extras.reads == "int4" and param.name in MATRICES:
                tensors |= coded(param, whole[~held_E.to(whole.device)])
            elif extras.reads != "permitted":
                tensors[f"others/{param.key}"] = whole[~held_E.to(whole.device)]
        elif how == "whole":
            tensors[f"whole/{param.key}"] = params[param.key]
    if with_trunk:
        tensors |= with_prefix("trunk", setting.trunk(params, plan))
    return seal(TaskHead(setting.session, setting.config, setting.vocabulary, trunk, costs, told), tensors)


def read_task(data: bytes, *, largest: int, declared: Declared = lambda _: ()) -> Asked:
    """Read what ``task_bytes`` wrote.

    Args:
        data: bytes from the server.
        largest: bytes that a task may have.
        declared: the wishes of the system that a configuration names; asked only where there are wishes.

    Raises:
        WireError: not a task, a wish that its system does not declare or that is not as declared, or its plan is not
            the one that its ``plan_id`` names.
    """
    head, tensors = unseal(data, TaskHead, largest=largest)
    told = head.plan
    shape_LE = tuple(tensors["mask/permitted"].shape) if "mask/permitted" in tensors else ()
    if len(shape_LE) != 2:
        raise WireError("a task has no mask of permitted experts")
    masks = [array_of(tensors, f"mask/{name}", torch.bool, shape_LE) for name in ("permitted", "trainable")]
    alias_LE = array_of(tensors, "mask/alias", torch.int64, shape_LE) if "mask/alias" in tensors else None
    cached_LE = array_of(tensors, "mask/cached", torch.bool, shape_LE) if "mask/cached" in tensors else None
    wished = made_again(told.wishes, tensors, declared(head.config) if told.wishes else (), shape_LE)
    extras = Extras(
        cached_LE=cached_LE,
        **wished,
        rows=dict(_own_rows(tensors)),
        alias_LE=alias_LE,
        surcharge=told.surcharge,
        validate=told.validate,
        keeps=frozenset(told.keeps),
        train_router=told.train_router,
        lora_rank=told.lora_rank,
        out_scale_L=None if told.out_scale_L is None else tuple(told.out_scale_L),
    )
    names = {item.name for item in fields(ExpertPlan)} & {*PlanHead.__struct_fields__}
    own = {name: getattr(told, name) for name in names}
    try:
        plan = ExpertPlan(permitted_LE=masks[0], trainable_LE=masks[1], extras=extras, **own)
    except ValueError as error:
        raise WireError(f"a task has a plan that cannot be ({error})") from None
    if plan.id != told.plan_id:
        raise WireError(f"a task names plan {told.plan_id!r:.40} and holds plan {plan.id}")
    if head.trunk and (found := by_prefix(tensors, "trunk")) and model_hash(found) != head.trunk:
        raise WireError("a task has a trunk that is not the one it names")
    return Asked(head, plan, tensors)


def _own_rows(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[int, Tensor]]]:
    for key, rows in by_prefix(tensors, "rows").items():
        experts = array_of(tensors, f"rows_of/{key}", torch.int64, (len(rows),)).tolist()
        yield str(TensorKey.parse(key)), dict(zip(experts, rows, strict=True))


def _nothing(param: ParamSpec) -> Tensor:
    """A tensor of zeros, of which memory is taken only where something is written: numpy asks the system for it."""
    size = int(np.prod(param.shape)) * param.dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(param.dtype).view(param.shape)


def _check(param: ParamSpec, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise WireError(f"a task lacks experts of {param.key}, which a probe of its plan reads")
    if tuple(tensor.shape) != shape or tensor.dtype != param.dtype:
        raise WireError(f"{param.key} came as {tensor.dtype} {tuple(tensor.shape)}, not {param.dtype} {shape}")
