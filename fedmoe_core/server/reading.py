"""What a client's result must be made of before an algorithm reads it: it follows from the plan and the model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.tensor_key import DENSE, TensorKey
from fedmoe_core.client.traffic import kind_of
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.state import BIASES, MATRICES, STEERING
from fedmoe_core.messages.measure import LARGEST_MEASURE, misanswered
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ExpertFeedback
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.model.spec import ModelSpec

HALF = (torch.float16, torch.bfloat16)  # what was trained in these may come in float32 too
Form = tuple[tuple[int, ...], torch.dtype]


def unlike(plan: ExpertPlan, result: LocalResult, spec: ModelSpec) -> str:
    """Return in one sentence what of a result is not as its plan asks; empty where an algorithm may read it.

    Names, shapes and dtypes of all tensors are looked at, and the numbers of those that ``server.admission`` never
    sees: what probes answered, what stays with the client, and how its tokens fared.

    Args:
        plan: what was asked.
        result: what came; not trusted.
        spec: of the global model.
    """
    kept = kept_forms(plan, spec)
    for key in sorted(kept.keys() ^ result.kept.keys()):
        return f"{key!r:.80} {'is missing among' if key in kept else 'is not one of'} the tensors that its plan keeps"
    for key, form in kept.items():
        if fault := _fault(key, result.kept[key], form):
            return fault
        if not bool((result.kept[key].abs() <= LARGEST_MEASURE).all()):  # NaN is not
            return f"{key} holds NaN, infinity or a number above {LARGEST_MEASURE:g}"
    sent = sent_forms(plan, spec)
    for key, delta in result.deltas.items():
        if key not in sent:
            return f"unknown key {key!r:.80}: it is not among the tensors that this plan trains"
        if fault := _fault(key, delta, sent[key]):
            return fault
    shape_LE = plan.permitted_LE.shape
    return misanswered(plan.extras.measures, result.probed, shape_LE) or _misfared(result.feedback, shape_LE)


def sent_forms(plan: ExpertPlan, spec: ModelSpec) -> dict[str, Form]:
    """Return shape and dtype of every change that a client of this plan may send, by key."""
    dense = {param.key: (tuple(param.shape), param.dtype) for param in spec.params if param.kind == "dense"}
    trained = {key: form for key, form in _trained(plan, spec) if not _stays(key, plan, spec)}
    return dense | trained


def kept_forms(plan: ExpertPlan, spec: ModelSpec) -> dict[str, Form]:
    """Return shape and dtype of every tensor that comes back as ``LocalResult.kept``, by key."""
    return {key: form for key, form in _trained(plan, spec) if _stays(key, plan, spec)}


def _trained(plan: ExpertPlan, spec: ModelSpec) -> Iterator[tuple[str, Form]]:
    """What trains in the MoE layers: a row for each trainable expert; adapters of the plan's rank, or whole experts."""
    rank = plan.extras.lora_rank
    adapted = rank is not None or any(param.name in FACTORS for param in spec.params)
    for param in spec.params:
        if param.layer == DENSE:
            continue
        count = int(plan.trainable_LE[param.layer].sum())
        if not count:
            continue
        shape = (count, *param.shape[1:])
        if param.name in STEERING:
            if plan.extras.train_router:
                yield param.key, (shape, param.dtype)
        elif param.name in FACTORS:
            cut = param.shape[1:] if rank is None else _of_rank(param.name, param.shape[1:], rank)
            yield param.key, ((count, *cut), param.dtype)
        elif not adapted and param.name in (*MATRICES, *BIASES):
            yield param.key, (shape, param.dtype)
        elif rank is not None and param.name in MATRICES and param.kind != "frozen":  # adapters of a round
            side, (rows, columns) = param.name.removeprefix("w_"), param.shape[1:]
            for name, factor in ((f"a_{side}", (rank, columns)), (f"b_{side}", (rows, rank))):
                yield str(TensorKey(param.layer, name)), ((count, *factor), param.dtype)
    if plan.extras.out_scale_L is not None:
        double = any(param.name == "w_in" and param.dtype == torch.float64 for param in spec.params)
        for key in spec.keys_of("out_scale"):
            yield key, ((), torch.float64 if double else torch.float32)


def _of_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (rank, shape[1]) if name.startswith("a_") else (shape[0], rank)


def _stays(key: str, plan: ExpertPlan, spec: ModelSpec) -> bool:
    return key not in spec.keys or kind_of(key) in plan.extras.keeps


def _fault(key: str, tensor: Tensor, form: Form) -> str:
    shape, dtype = form
    if type(tensor) is not Tensor or tuple(tensor.shape) != shape:
        return f"{key} is not a tensor of shape {shape}"
    if tensor.dtype != dtype and not (dtype in HALF and tensor.dtype == torch.float32):
        return f"{key} has dtype {tensor.dtype}, not {dtype}"
    return ""


def _misfared(feedback: ExpertFeedback | None, shape_LE: tuple[int, ...]) -> str:
    if feedback is None:
        return ""
    tables: Mapping[str, object] = {item.name: getattr(feedback, item.name) for item in fields(ExpertFeedback)}
    for name, table_LE in tables.items():
        if type(table_LE) is not np.ndarray or table_LE.dtype != np.float64 or table_LE.shape != shape_LE:
            return f"feedback.{name} is not an array of float64 of shape {shape_LE}"
        if not ((table_LE >= 0) & (table_LE <= LARGEST_MEASURE)).all():
            return f"feedback.{name} holds NaN, infinity or a number outside 0 to {LARGEST_MEASURE:g}"
    if (feedback.correct_LE > feedback.rows_LE).any():
        return "feedback.correct_LE is above feedback.rows_LE, of which it is a part"
    return ""
