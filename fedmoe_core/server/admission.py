"""Which updates may enter the sums: every reason to refuse one, in words fit for the ledger (invariant 11)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.layer.state import BIASES
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.update import LONGEST_REASON, ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.blocks import end_to_end, reach, square_sum
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.schema import LARGEST_WHOLE, malformed, received

HALF = (torch.float16, torch.bfloat16)
LARGEST_SUM = 1e30  # of importance; what is summed over clients then stays far below the end of float64
SLACK = 1e-3  # by which sums of probabilities may pass what they are bound by, through rounding
MOST_PRIVATE = 1 << 30  # values of all private tensors of an update


@dataclass(frozen=True)
class Admission:
    """What became of one update: in the sums, or refused with a reason and without a trace in them."""

    client: int
    round: int
    accepted: bool
    reason: str = ""


def expected_shapes(specs: Sequence[ParamSpec], plan: ExpertPlan) -> dict[str, tuple[int, ...]]:
    """Return the key and shape of every delta that ``plan`` asks for.

    Expert and router tensors of a layer with Bt > 0 trainable experts come as (Bt, ...), dense tensors whole; a layer
    without a trainable expert sends nothing, and so does a kind that the plan keeps on the client.

    Args:
        specs: the tensors that may train in this run.
        plan: the client's plan.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        if spec.kind in plan.extras.keeps or (spec.name in BIASES and plan.extras.lora_rank is not None):
            continue  # kept by the client; or a bias, which adapters leave as it is
        if spec.kind == "dense":
            shapes[spec.key] = tuple(spec.shape)
        elif plan.trainable_LE[spec.layer].any():
            shapes[spec.key] = (int(plan.trainable_LE[spec.layer].sum()), *spec.shape[1:])
    return shapes


def refusal(update: ClientUpdate, plan: ExpertPlan, specs: Sequence[ParamSpec], settings: SumSettings) -> str | None:
    """Return the first reason to refuse ``update``, None = it may be summed; as ``examined``."""
    return examined(update, plan, specs, settings)[0]


def examined(
    update: ClientUpdate, plan: ExpertPlan, specs: Sequence[ParamSpec], settings: SumSettings
) -> tuple[str | None, float]:
    """Return the first reason to refuse ``update``, and its largest |delta|. Reads only; never raises on bad content.

    Args:
        update: what the client sent; not trusted in any field.
        plan: what the server asked for; trusted.
        specs: the tensors that may train in this run.
        settings: bounds of values and norms.

    Returns:
        None where it may be summed, and then the largest |delta|, else infinity.
    """
    largest = math.inf
    try:
        update = received(update, plan)
        reason = (
            _header(update, plan)
            or _weights(update, plan)
            or _profile("profile", update.profile, plan)
            or _profile("validation_profile", update.validation_profile, plan)
            or _reported(update)
            or _tensors(update.deltas, {spec.key: spec for spec in specs}, expected_shapes(specs, plan))
        )
        if reason is None:
            reason, largest = _values(update.deltas, settings)
    except Exception as error:  # a hostile object may raise anything from anywhere; all of it means "malformed"
        reason = malformed(error)
    return (None, largest) if reason is None else (reason[:LONGEST_REASON], math.inf)


def _header(update: ClientUpdate, plan: ExpertPlan) -> str | None:
    if update.status != "ok":
        return f"client failed: {update.error}" if update.status == "failed" else update.error
    if update.client != plan.client:
        return f"is from client {update.client}, not from client {plan.client}"
    if update.round != plan.round:
        return f"is for round {update.round}, not for round {plan.round}"
    if update.plan_id != plan.id:
        return f"answers plan {update.plan_id!r:.20}, and the plan of this client and round is {plan.id!r}"
    return None


def _weights(update: ClientUpdate, plan: ExpertPlan) -> str | None:
    for name in ("expert_weight_LE", "router_weight_LE"):
        weight_LE = getattr(update, name)
        if type(weight_LE) is not np.ndarray or weight_LE.dtype != np.float64:
            return f"{name} is not a numpy array of float64"
        if weight_LE.shape != plan.trainable_LE.shape:
            return f"{name} has shape {weight_LE.shape}, not {plan.trainable_LE.shape}"
        if not weight_LE.size:
            continue  # a model without MoE layers
        if not np.isfinite(weight_LE).all():
            return f"{name} holds NaN or infinity"
        if (weight_LE < 0).any():
            return f"{name} is negative ({weight_LE.min():g})"
        if (weight_LE > 1).any():
            return f"{name} is above 1 ({weight_LE.max():g})"
        stray = np.argwhere((weight_LE > 0) & ~plan.trainable_LE)
        if len(stray):
            return f"{name} has weight on layer {stray[0][0]} expert {stray[0][1]}, which was not trained"
    for name in ("gate_weight", "sample_weight"):
        weight = getattr(update, name)
        if not 0 <= weight <= 1:
            return f"{name} is {'negative' if weight < 0 else 'above 1'} ({float(weight):g})"
    if update.sample_weight == 0:
        return "sample_weight is 0: the client has no data"
    if "router" in plan.extras.keeps and (update.gate_weight > 0 or update.router_weight_LE.any()):
        return "the router has a weight, but it stays on the client; give gate and router weight 0"
    if "expert" in plan.extras.keeps and update.expert_weight_LE.any():
        return "experts have a weight, but they stay on the client; give expert weight 0"
    if update.gate_weight > 0 and not plan.trainable_LE.any():
        return "gate_weight is positive, but no expert and so no router row was trained"
    return None


def _profile(name: str, profile: ClientProfile | None, plan: ExpertPlan) -> str | None:
    """Statistics steer the next plans, so neither NaN nor what no router can give may enter through them."""
    if profile is None:
        return None
    shape_LE = plan.permitted_LE.shape
    for field in fields(ClientProfile):
        value, shape = getattr(profile, field.name), shape_LE if field.name.endswith("_LE") else shape_LE[:1]
        dtype = np.bool_ if field.name == "held_LE" else np.float64
        if type(value) is not np.ndarray or value.dtype != dtype or value.shape != shape:
            return f"{name}.{field.name} is not an array of {dtype.__name__} of shape {shape}"
        if not np.isfinite(value).all():
            return f"{name}.{field.name} holds NaN or infinity"
    if not (profile.held_LE == plan.permitted_LE).all():
        return f"{name}.held_LE differs from the experts that the plan permits"
    tokens_L = profile.tokens_L
    if tokens_L.size and not (tokens_L.min() >= 0 and tokens_L.max() <= LARGEST_WHOLE):
        return f"{name}.tokens_L counts {tokens_L.min():g} to {tokens_L.max():g} tokens"
    tokens_L1 = tokens_L[:, None]
    each_L1 = np.full_like(tokens_L1, LARGEST_SUM)
    for field_name, least, most in (
        ("hits_LE", 0.0, tokens_L1),
        ("prob_sum_LE", 0.0, tokens_L1),
        ("prob_max_LE", 0.0, np.ones_like(tokens_L1)),
        ("plogp_sum_LE", -tokens_L1 / math.e, 0.0),  # p log p is least at 1/e
        ("lost_mass_L", 0.0, tokens_L),
        ("rows_LE", 0.0, tokens_L1 * shape_LE[1]),
        ("taylor_LE", -each_L1, each_L1),
        ("taylor_abs_LE", 0.0, each_L1),
        ("fisher_LE", 0.0, each_L1),
        ("grad_sq_LE", 0.0, each_L1),
        ("reap_sum_LE", 0.0, each_L1),
    ):
        value = getattr(profile, field_name)
        below, above = least - SLACK * (1 + np.abs(least)), most + SLACK * (1 + np.abs(most))
        if ((value < below) | (value > above)).any():
            return f"{name}.{field_name} reaches {value.min():g} to {value.max():g}, more than its tokens can give"
    return None


def _reported(update: ClientUpdate) -> str | None:
    """What an algorithm keeps of a client steers its later plans, so it must be plain finite numbers too."""
    values = 0
    for name, tensor in update.private.items():
        if not _plain(tensor) or tensor.is_complex():
            return f"private {name!r:.80} is not a dense tensor with real data"
        values += tensor.numel()
        if values > MOST_PRIVATE:
            return f"private tensors hold more than {MOST_PRIVATE} values"
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"private {name!r:.80} holds NaN or infinity"
    return None


def _plain(tensor: Any) -> bool:
    """Whether this is a tensor of torch's own class, with data and without a graph behind it."""
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.requires_grad
        and not tensor.is_quantized
    )


def _tensors(
    deltas: Mapping[str, Any], specs: Mapping[str, ParamSpec], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    for key in deltas:
        if key not in shapes:
            return f"unknown key {key!r:.80}: it is not among the tensors that this plan trains"
    for key, shape in shapes.items():
        if key not in deltas:
            return f"missing key {key!r}"
        delta, dtype = deltas[key], specs[key].dtype
        if not _plain(delta):
            return f"{key} is not a dense tensor with data"
        # Deltas of half-precision models may keep the float32 of the optimizer's arithmetic.
        if delta.dtype != dtype and not (dtype in HALF and delta.dtype == torch.float32):
            return f"{key} has dtype {delta.dtype}, not {dtype}"
        # Compared whole, so that a shape which would broadcast, (1, H) or (H,) for (Bt, H), is refused as well.
        if tuple(delta.shape) != shape:
            return f"{key} has shape {tuple(delta.shape)}, not {shape}"
    return None


def _values(deltas: Mapping[str, Tensor], settings: SumSettings) -> tuple[str | None, float]:
    """Finite, bounded, and of bounded norm; keys in sorted order so that the verdict has no order either."""
    if len(deltas) > 1 and (whole := end_to_end(list(deltas.values()))) is not None:
        largest, squares = reach(whole)
        if largest <= settings.value_bound and squares <= settings.norm_bound * settings.norm_bound:
            return None, largest  # else tensor by tensor, for the words and for what is in doubt
    most, farthest = [], 0.0
    for key in sorted(deltas):
        largest, squares = reach(deltas[key].detach())
        if not math.isfinite(largest):
            return f"{key} holds NaN or infinity", math.inf
        if largest > settings.value_bound:
            return f"{key} reaches {largest:.4g}, above value_bound {settings.value_bound:g}", math.inf
        most.append(squares)
        farthest = max(farthest, largest)
    if math.fsum(most) <= settings.norm_bound * settings.norm_bound:
        return None, farthest
    # In doubt, and for the words: in float64.
    norm = math.sqrt(math.fsum(square_sum(deltas[key].detach()) for key in sorted(deltas)))
    if norm > settings.norm_bound:
        return f"L2 norm {norm:.4g} is above norm_bound {settings.norm_bound:g}", math.inf
    return None, farthest
