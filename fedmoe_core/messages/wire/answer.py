"""A client's result as bytes, and read by a server that believes none of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from fedmoe_core.budget.limits import Cost
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ClientProfile, ExpertFeedback, profile_arrays
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.wire.envelope import WireError, array_of, by_prefix, seal, unseal, with_prefix
from fedmoe_core.model.spec import Evaluation

LONGEST_REASON = 300  # characters
Whole = Annotated[int, Meta(ge=0, le=1 << 53)]  # what logs can hold
PARTS = ("delta", "kept", "probed", "profile", "validation_profile", "feedback", "trained")


class CostHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As ``Cost``, without what the server reckons itself."""

    memory_bytes: Whole
    flops: float
    bytes_down: Whole
    bytes_up: Whole
    experts: Whole
    seconds: float


class ValidationHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As ``Evaluation``."""

    loss_sum: float
    count: int
    correct: int


class AnswerHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer says in words and numbers.

    Attributes:
        session: the run, as the server named it in the plan's message.
        client, round, plan_id: as ``ClientUpdate``.
    """

    session: str
    client: int
    round: int
    plan_id: str
    status: Literal["ok", "failed"]
    error: str
    cost: CostHead
    losses: list[float]
    validation: ValidationHead | None = None


def answer_bytes(plan: ExpertPlan, result: LocalResult | LocalFailure, session: str) -> bytes:
    """Put what became of a plan into bytes.

    Args:
        plan: what was asked.
        result: what came of it.
        session: the run.
    """
    cost = CostHead(*(getattr(result.cost, item) for item in CostHead.__struct_fields__))
    if isinstance(result, LocalFailure):
        reason = result.error[:LONGEST_REASON]
        return seal(AnswerHead(session, plan.client, plan.round, plan.id, "failed", reason, cost, []), {})
    found = result.validation
    told = None if found is None else ValidationHead(found.loss_sum, found.count, found.correct)
    head = AnswerHead(session, plan.client, plan.round, plan.id, "ok", "", cost, list(result.losses), told)
    tensors = with_prefix("delta", result.deltas) | with_prefix("kept", result.kept)
    tensors |= with_prefix("probed", result.probed) | with_prefix("profile", _tables(result.profile))
    if result.validation_profile is not None:
        tensors |= with_prefix("validation_profile", _tables(result.validation_profile))
    if result.feedback is not None:
        arrays = {item.name: torch.from_numpy(getattr(result.feedback, item.name)) for item in fields(ExpertFeedback)}
        tensors |= with_prefix("feedback", {name: array.double() for name, array in arrays.items()})
    if result.trained_LE is not None:
        tensors["trained/LE"] = torch.from_numpy(result.trained_LE)
    return seal(head, tensors)


def read_answer(data: bytes, plan: ExpertPlan, session: str, *, largest: int) -> LocalResult | LocalFailure:
    """Read an answer to ``plan``.

    Its form is checked here; ``server.admission`` checks what it says.

    Args:
        data: bytes from anywhere.
        plan: what was asked of the client from whom they came.
        session: the run.
        largest: bytes that the answer may have.

    Raises:
        WireError: not an answer, or one of another client, round, plan or run.
    """
    head, tensors = unseal(data, AnswerHead, largest=largest)
    for name, said, asked in (
        ("run", head.session, session),
        ("client", head.client, plan.client),
        ("round", head.round, plan.round),
        ("plan", head.plan_id, plan.id),
    ):
        if said != asked:
            raise WireError(f"an answer is for {name} {said!r:.40}, not for {name} {asked!r:.40}")
    cost = Cost(**{item: getattr(head.cost, item) for item in CostHead.__struct_fields__})
    if head.status == "failed":
        return LocalFailure(cost, head.error[:LONGEST_REASON] or "failed")
    strange = sorted({name.partition("/")[0] for name in tensors} - {*PARTS})
    if strange:
        raise WireError(f"an answer has tensors of an unknown part {strange[0]!r:.40}")
    if len(head.losses) > plan.local_steps or not all(math.isfinite(loss) for loss in head.losses):
        raise WireError(f"an answer has losses that are not at most {plan.local_steps} finite numbers")
    shape_LE = plan.permitted_LE.shape
    told = head.validation
    _only_what_was_asked(plan, tensors, told)
    trained_LE = array_of(tensors, "trained/LE", torch.bool, shape_LE) if "trained/LE" in tensors else None
    if trained_LE is not None and (trained_LE & ~plan.trainable_LE).any():
        raise WireError("an answer says that experts learnt which its plan does not train")
    return LocalResult(
        deltas=by_prefix(tensors, "delta"),
        profile=_profile(by_prefix(tensors, "profile"), shape_LE),
        cost=cost,
        losses=tuple(head.losses),
        kept=by_prefix(tensors, "kept"),
        probed=by_prefix(tensors, "probed"),
        validation=None if told is None else Evaluation(told.loss_sum, told.count, told.correct),
        validation_profile=_optional(by_prefix(tensors, "validation_profile"), shape_LE),
        feedback=_feedback(by_prefix(tensors, "feedback"), shape_LE),
        trained_LE=trained_LE,
    )


def _only_what_was_asked(plan: ExpertPlan, tensors: Mapping[str, Tensor], told: ValidationHead | None) -> None:
    """Refuse what no plan asked for: an algorithm may read it without a second look."""
    parts, extras = {name.partition("/")[0] for name in tensors}, plan.extras
    if extras.before is None and extras.after is None and "probed" in parts:
        raise WireError("an answer has measurements that its plan did not ask for")
    if not extras.validate and (told is not None or parts & {"validation_profile", "feedback"}):
        raise WireError("an answer has a validation that its plan did not ask for")


def _tables(profile: ClientProfile) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in profile_arrays(profile).items()}


def _profile(tensors: Mapping[str, Tensor], shape_LE: tuple[int, ...]) -> ClientProfile:
    arrays = {}
    for item in fields(ClientProfile):
        shape = shape_LE if item.name.endswith("_LE") else shape_LE[:1]
        arrays[item.name] = array_of(tensors, item.name, torch.bool if item.name == "held_LE" else torch.float64, shape)
    return ClientProfile(**arrays)


def _optional(tensors: Mapping[str, Tensor], shape_LE: tuple[int, ...]) -> ClientProfile | None:
    return _profile(tensors, shape_LE) if tensors else None


def _feedback(tensors: Mapping[str, Tensor], shape_LE: tuple[int, ...]) -> ExpertFeedback | None:
    if not tensors:
        return None
    return ExpertFeedback(*(array_of(tensors, item.name, torch.float64, shape_LE) for item in fields(ExpertFeedback)))
