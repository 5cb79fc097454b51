"""What each field of an update must be, whatever was asked: one typed reading at the door (invariant 11)."""

from __future__ import annotations

import math

from fedmoe_core.budget.limits import Cost
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.messages.update import LONGEST_REASON, ClientUpdate, blank
from fedmoe_core.model.spec import Evaluation

LARGEST_WHOLE = 1 << 53  # the logs' readers hold numbers as float64, which is exact up to here
LARGEST_COST = 1e30
MOST_NAMES = 10_000  # entries of ``private`` and of ``metrics``
WHOLE = ("client", "round", "samples", "steps", "cohort")
REAL = ("gate_weight", "sample_weight")
TEXT = ("plan_id", "status", "error", "alone")
WHOLE_COSTS = ("memory_bytes", "bytes_down", "bytes_up", "experts")


def received(update: object, plan: ExpertPlan) -> ClientUpdate:
    """Read what came as the answer to ``plan``; what is returned has plain scalars, names and containers of their type.

    Types are compared exactly: an object of a subclass may say one thing when it is checked and another when it is
    used. Arrays and tensors are looked at by ``admission.examined``, for they take time.

    Args:
        update: what came; not trusted to be anything.
        plan: what the server asked for; trusted.

    Returns:
        ``update`` itself, or a blank: of a client that failed its reason and cost, else a refusal with the first fault.
    """
    try:
        fault = _fault(update)
        if fault is None:
            assert isinstance(update, ClientUpdate)
            failed = update.status == "failed"
            return blank(plan, update.error or "failed", status="failed", cost=update.cost) if failed else update
    except Exception as error:  # a hostile object may raise anything from anywhere; all of it means "malformed"
        fault = malformed(error)
    return blank(plan, fault)


def malformed(error: Exception) -> str:
    """Say what an object raised when it was looked at; its own words may raise as well."""
    try:
        return f"malformed update ({type(error).__name__}: {error})"[:LONGEST_REASON]
    except Exception:
        return "malformed update (it raises where it is read)"


def _fault(update: object) -> str | None:
    if type(update) is not ClientUpdate:
        return f"is a {type(update).__name__}, not a ClientUpdate"
    for name in WHOLE:
        value = getattr(update, name)
        if type(value) is not int or not 0 <= value <= LARGEST_WHOLE:
            return f"{name} is not a whole number from 0 to 2^53{_is(value)}"
    for name in REAL:
        value = getattr(update, name)
        if type(value) not in (float, int) or not math.isfinite(value):
            return f"{name} is not a finite number{_is(value)}"
    for name in ("loss_first", "loss_last"):
        value = getattr(update, name)
        if type(value) is not float or math.isinf(value):
            return f"{name} is not a number{_is(value)}"  # NaN: not known
    for name in TEXT:
        value = getattr(update, name)
        if type(value) is not str:
            return f"{name} is not text{_is(value)}"
    if update.status not in ("ok", "failed"):
        return f"status is {update.status!r:.40}, and a client says ok or failed"
    if len(update.alone) > LONGEST_REASON:
        return f"alone has {len(update.alone)} characters, more than {LONGEST_REASON}"
    return _cost(update.cost) or _records(update)


def _cost(cost: object) -> str | None:
    if type(cost) is not Cost:
        return f"cost is a {type(cost).__name__}, not a Cost"
    for name, value in vars(cost).items():
        kinds = (int,) if name in WHOLE_COSTS else (float, int)
        if type(value) not in kinds or not 0 <= value <= LARGEST_COST:  # written so that NaN is refused
            return f"cost.{name} is not {'a whole number' if kinds == (int,) else 'a number'} of at least 0{_is(value)}"
    return None


def _records(update: ClientUpdate) -> str | None:
    for name in ("profile", "validation_profile"):
        if type(record := getattr(update, name)) not in (ClientProfile, type(None)):
            return f"{name} is a {type(record).__name__}, not a ClientProfile"
    if (found := update.validation) is not None:
        if type(found) is not Evaluation:
            return f"validation is a {type(found).__name__}, not an Evaluation"
        if any(type(value) is not int for value in (found.count, found.correct)) or not 0 < found.count < LARGEST_WHOLE:
            return "validation does not count its predictions in whole numbers of at least 1"
        if type(found.loss_sum) is not float or not math.isfinite(found.loss_sum):
            return f"validation.loss_sum is not a finite number{_is(found.loss_sum)}"
        if not 0 <= found.correct <= found.count:
            return f"validation has {found.correct} right of {found.count} predictions"
    if update.wire is not None:
        return "wire is not empty, and the server counts what travels"
    for name in ("deltas", "private", "metrics"):
        record = getattr(update, name)
        if type(record) is not dict:
            return f"{name} is a {type(record).__name__}, not a dict"
        if len(record) > MOST_NAMES:
            return f"{name} has {len(record)} entries, more than {MOST_NAMES}"
        for key in record:
            if type(key) is not str or len(key) > LONGEST_REASON:
                return f"{name} has a key that is not a text of at most {LONGEST_REASON} characters"
    for name, value in update.metrics.items():
        if type(value) is not float or not math.isfinite(value):
            return f"metric {name!r:.80} is not a finite number{_is(value)}"
    return None


def _is(value: object) -> str:
    """`` (it is ...)`` of a plain number or a short text; the type of anything else, whose words may be endless."""
    if type(value) in (bool, float) or (type(value) is int and abs(value) < 1 << 64):
        return f" (it is {value})"
    if type(value) is str and len(value) <= 40:
        return f" (it is {value!r})"
    return f" (it is a {type(value).__name__})"
