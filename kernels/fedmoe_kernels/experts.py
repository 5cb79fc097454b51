"""`moe_mlp`, the differentiable mixture of experts over compact slots: its records, its checks, its choice of body.

Shapes: T tokens, K top-k, B slots, Bt trainable slots, R = T * K places, H hidden, I intermediate, F = 2 * I for
gated activations and I for the others, r LoRA rank, Bl slots with an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe_kernels import reference
from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.ops import moe_mlp_op
from fedmoe_kernels.routing import Routing
from fedmoe_kernels.scores import ExpertScores

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One stacked matrix or bias of all slots, trainable slots first; Bt is a shape, so no other gradient can exist.

    Attributes:
        trainable: (Bt, ...), usually a Parameter; Bt may be 0.
        frozen: (B - Bt, ...), usually a buffer; None when every slot is trainable.

    Raises:
        ValueError: when the two differ in dtype or trailing shape, or the frozen part asks for a gradient.
    """

    trainable: Tensor
    frozen: Tensor | None = None

    def __post_init__(self) -> None:
        if self.frozen is None:
            return
        if self.trainable.shape[1:] != self.frozen.shape[1:] or self.trainable.dtype != self.frozen.dtype:
            raise ValueError(
                f"ExpertWeights: trainable is {_what(self.trainable)}, frozen {_what(self.frozen)}; "
                "they must agree in dtype and in every axis but the first"
            )
        if self.frozen.requires_grad:
            raise ValueError("ExpertWeights: the frozen part requires a gradient; pass it detached, as a buffer")


@dataclass(frozen=True, eq=False)
class ExpertLora:
    """Adapters per slot, W_in + scale * b_in @ a_in and W_out + scale * b_out @ a_out, over frozen base experts.

    Attributes:
        a_in, b_in, a_out, b_out: (Bl, r, H), (Bl, F, r), (Bl, r, I), (Bl, H, r); slots from Bl on have no adapter.
        scale: one number, or (Bl,); a constant, it gets no gradient.
        base_of_slot_B: (B,) int64, the row of `w_in`, `w_out` and the biases that each slot runs, so that clients of a
            cohort can share them; None = its own index.
    """

    a_in: Tensor
    b_in: Tensor
    a_out: Tensor
    b_out: Tensor
    scale: float | Tensor = 1.0
    base_of_slot_B: Tensor | None = None


class _Stack(NamedTuple):
    """A stacked tensor as the operator takes it, with the name that its errors use."""

    name: str
    trainable: Tensor
    frozen: Tensor | None

    @property
    def rows(self) -> int:
        return self.trainable.shape[0] + (0 if self.frozen is None else self.frozen.shape[0])


def moe_mlp(
    x_TH: Tensor,
    routing: Routing,
    w_in: Tensor | ExpertWeights,
    w_out: Tensor | ExpertWeights,
    *,
    activation: str = "swiglu",
    bias_in: Tensor | ExpertWeights | None = None,
    bias_out: Tensor | ExpertWeights | None = None,
    trainable_B: Tensor | None = None,
    lora: ExpertLora | None = None,
    scores: ExpertScores | None = None,
    backend: str = "auto",
) -> Tensor:
    """y[t] = sum over the rows of token t of weight * (w_out @ f(w_in @ x[t] + bias_in) + bias_out); shape (T, H).

    Differentiable by x, `routing.weights_TK`, trainable weights and biases, adapter factors. Exact for any routing:
    slots without a row get zero gradients, places without a row count nowhere. Two runs with the same inputs and
    threads give the same bits. Under torch.autocast, x and all weights are cast to the autocast dtype. One host read
    of `routing.offsets_B1` per call and direction on CPU.

    Args:
        x_TH: tokens; float32, float64, bfloat16 or float16.
        routing: who goes where, of this x and these slots; its weights may have any floating dtype.
        w_in: (B, F, H), gated forms as [gate; up]. Dtype of x. Non-contiguous weights are copied at every call.
        w_out: (B, H, I).
        activation: "swiglu", "geglu", "swiglu_oai", "relu", "gelu", "silu"; formulas in `reference.activate`.
        bias_in, bias_out: (B, F) and (B, H), in the same form (tensor or ExpertWeights) as the weights.
        trainable_B: for plain tensors, bool (B,): slots outside it get no weight gradient; the gradient tensor is
            full-sized and zero there. With `lora` it picks the adapters that learn.
        lora: adapters; the weights and biases must then be frozen.
        scores: importance sums to add to in the backward.
        backend: "auto" and "cpu" take this device's fast path, "reference" the loops of `reference.py`.

    Returns:
        (T, H) in the dtype of x.

    Raises:
        ValueError: names the argument that does not fit the others.
    """
    stacks = _stacks(w_in=w_in, w_out=w_out, bias_in=bias_in, bias_out=bias_out)
    _check_call(x_TH, activation, backend, scores)
    slots = _check_routing(x_TH, routing)
    _check_stacks(x_TH, stacks, activation)
    _check_slots(slots, stacks, trainable_B, lora, scores)
    x_TH, stacks, lora = _autocast(x_TH, stacks, lora)
    for stack in stacks.values():
        _check_like(stack.name, stack.trainable, x_TH)
    if lora is not None:
        _check_lora(x_TH, stacks, lora, slots)
    if backend == "reference":
        return _by_reference(x_TH, routing, stacks, activation, trainable_B, lora)
    tensors = _tensors(x_TH, routing, stacks, trainable_B, lora)
    leaf_B6 = None if scores is None else scores.leaf_B6
    keep_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, leaf_B6))
    return moe_mlp_op(*tensors, leaf_B6, activation, keep_z)[0]


def _tensors(
    x_TH: Tensor, routing: Routing, stacks: dict[str, _Stack], trainable_B: Tensor | None, lora: ExpertLora | None
) -> list[Tensor | None]:
    """The operator's tensors, in the order of `ops.OpInputs`."""
    weights = [stacks.get(name) for name in ("w_in", "w_out", "bias_in", "bias_out")]
    adapter: list[Tensor | None] = [None] * 6
    if lora is not None:
        scale_B = torch.as_tensor(lora.scale, dtype=torch.float64, device=x_TH.device).detach()
        adapter = [lora.a_in, lora.b_in, lora.a_out, lora.b_out, scale_B.expand(lora.a_in.shape[0])]
        adapter.append(lora.base_of_slot_B)
    tensors = [
        x_TH,
        *(routing.weights_TK, routing.rows_TK, routing.tokens_R, routing.places_R, routing.offsets_B1),
        *(None if stack is None else stack.trainable for stack in weights),
        *(None if stack is None else stack.frozen for stack in weights),
        *adapter,
        trainable_B,
    ]
    return [None if t is None else t.contiguous() for t in tensors]


def _by_reference(
    x_TH: Tensor,
    routing: Routing,
    stacks: dict[str, _Stack],
    activation: str,
    trainable_B: Tensor | None,
    lora: ExpertLora | None,
) -> Tensor:
    def whole(stack: _Stack | None) -> Tensor | None:
        if stack is None:
            return None
        both = stack.trainable if stack.frozen is None else torch.cat([stack.trainable, stack.frozen])
        return _learn_only(both, trainable_B) if lora is None else both

    if lora is not None:
        missing = routing.num_slots - lora.a_in.shape[0]
        factors = [torch.cat([f, f.new_zeros(missing, *f.shape[1:])]) for f in (lora.a_in, lora.b_in, lora.a_out)]
        factors.append(torch.cat([lora.b_out, lora.b_out.new_zeros(missing, *lora.b_out.shape[1:])]))
        scale_B = torch.as_tensor(lora.scale, dtype=x_TH.dtype, device=x_TH.device).expand(lora.a_in.shape[0])
        scale_B = torch.cat([scale_B, scale_B.new_zeros(missing)])
        lora = ExpertLora(*(_learn_only(f, trainable_B) for f in factors), scale_B, lora.base_of_slot_B)
    w_in, w_out = whole(stacks["w_in"]), whole(stacks["w_out"])
    assert w_in is not None
    assert w_out is not None
    return reference.moe_mlp(
        x_TH,
        routing.slots_TK,
        routing.weights_TK.to(x_TH.dtype),
        w_in,
        w_out,
        activation=activation,
        bias_in=whole(stacks.get("bias_in")),
        bias_out=whole(stacks.get("bias_out")),
        lora=lora,
    )


def _learn_only(stack: Tensor, trainable_B: Tensor | None) -> Tensor:
    if trainable_B is None:
        return stack
    return torch.where(trainable_B.view(-1, *[1] * (stack.dim() - 1)), stack, stack.detach())


def _autocast(
    x_TH: Tensor, stacks: dict[str, _Stack], lora: ExpertLora | None
) -> tuple[Tensor, dict[str, _Stack], ExpertLora | None]:
    """Operators registered from Python know no autocast, so cast by hand; the routing weights keep their dtype."""
    if not torch.is_autocast_enabled(x_TH.device.type) or x_TH.dtype == torch.float64:
        return x_TH, stacks, lora
    dtype = torch.get_autocast_dtype(x_TH.device.type)
    cast = {
        name: _Stack(name, stack.trainable.to(dtype), None if stack.frozen is None else stack.frozen.to(dtype))
        for name, stack in stacks.items()
    }
    if lora is not None:
        factors = [f.to(dtype) for f in (lora.a_in, lora.b_in, lora.a_out, lora.b_out)]
        lora = ExpertLora(*factors, lora.scale, lora.base_of_slot_B)
    return x_TH.to(dtype), cast, lora


def _stacks(**given: Tensor | ExpertWeights | None) -> dict[str, _Stack]:
    """Bring both forms to one; all four must be given in the same form and with the same Bt."""
    forms = {name: value for name, value in given.items() if value is not None}
    records = {name for name, value in forms.items() if isinstance(value, ExpertWeights)}
    if records and records != set(forms):
        other = next(name for name in forms if name not in records)
        raise ValueError(f"{other} is a plain tensor beside ExpertWeights; give all weights and biases in one form")
    return {
        name: _Stack(name, value.trainable, value.frozen)
        if isinstance(value, ExpertWeights)
        else _Stack(name, value, None)
        for name, value in forms.items()
    }


def _check_call(x_TH: Tensor, activation: str, backend: str, scores: ExpertScores | None) -> None:
    if x_TH.dim() != 2 or x_TH.dtype not in _DTYPES:
        raise ValueError(f"x_TH is {_what(x_TH)}; it must be a floating (tokens, hidden) matrix")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if backend not in ("auto", "cpu", "reference"):
        raise ValueError(f"backend {backend!r} does not exist here; choose 'auto', 'cpu' or 'reference'")
    if backend == "reference" and scores is not None:
        raise ValueError("scores need backend 'auto' or 'cpu'; for the reference call reference.importance")
    if x_TH.device.type not in ("cpu", "meta") and backend != "reference":
        raise ValueError(f"x_TH is on {x_TH.device}, which has no kernel yet; move it to cpu or use backend='reference'")


def _check_routing(x_TH: Tensor, routing: Routing) -> int:
    """Raise unless the record belongs to this x; return B."""
    if routing.rows_TK.shape[0] != x_TH.shape[0] or routing.weights_TK.shape != routing.rows_TK.shape:
        raise ValueError(
            f"routing is of {routing.rows_TK.shape[0]} tokens, x_TH has {x_TH.shape[0]}; route the tokens of this x_TH"
        )
    if routing.weights_TK.device != x_TH.device or routing.rows_TK.device != x_TH.device:
        raise ValueError(f"routing is on {routing.rows_TK.device}, x_TH on {x_TH.device}; move one of them")
    if not routing.weights_TK.is_floating_point():
        raise ValueError(f"routing.weights_TK is {routing.weights_TK.dtype}; the weights must be floating")
    return routing.num_slots


def _check_stacks(x_TH: Tensor, stacks: dict[str, _Stack], activation: str) -> None:
    w_in, w_out = stacks["w_in"], stacks["w_out"]
    for stack in (w_in, w_out):
        if stack.trainable.dim() != 3 or stack.rows == 0 or 0 in stack.trainable.shape[1:]:
            raise ValueError(f"{stack.name} is {_what(stack.trainable)}; it must be 3-D with at least one slot")
    hidden, inner = w_out.trainable.shape[1:]
    width = ACTIVATIONS[activation].width(inner)
    if hidden != x_TH.shape[1]:
        raise ValueError(f"w_out is {_what(w_out.trainable)}, x_TH has hidden size {x_TH.shape[1]}; w_out is (B, H, I)")
    expected = {"w_in": (width, hidden), "w_out": (hidden, inner), "bias_in": (width,), "bias_out": (hidden,)}
    for name, stack in stacks.items():
        if stack.trainable.shape != (w_in.trainable.shape[0], *expected[name]) or stack.rows != w_in.rows:
            wanted = (w_in.trainable.shape[0], *expected[name])
            raise ValueError(
                f"{name} is {_what(stack.trainable)} with {stack.rows} slots; {activation!r} with the other arguments "
                f"needs {wanted} and {w_in.rows} slots"
            )


def _check_slots(
    slots: int,
    stacks: dict[str, _Stack],
    trainable_B: Tensor | None,
    lora: ExpertLora | None,
    scores: ExpertScores | None,
) -> None:
    w_in = stacks["w_in"]
    if (lora is None or lora.base_of_slot_B is None) and w_in.rows != slots:
        raise ValueError(f"w_in has {w_in.rows} slots, routing {slots}; use the SlotMap that the weights were stored by")
    if trainable_B is not None:
        if trainable_B.dtype != torch.bool or trainable_B.shape != (slots,):
            raise ValueError(f"trainable_B is {_what(trainable_B)}; it must be bool of shape ({slots},)")
        if w_in.frozen is not None:
            raise ValueError("trainable_B is given beside ExpertWeights, which already say what is trainable; drop it")
    if scores is not None and scores.num_slots != slots:
        raise ValueError(f"scores has {scores.num_slots} slots, routing {slots}; make one ExpertScores per layer")


def _check_lora(x_TH: Tensor, stacks: dict[str, _Stack], lora: ExpertLora, slots: int) -> None:
    for stack in stacks.values():
        if stack.trainable.requires_grad:
            raise ValueError(f"{stack.name} requires a gradient under lora; adapters sit on frozen weights, detach it")
    width, hidden = stacks["w_in"].trainable.shape[1:]
    inner, rank, count = stacks["w_out"].trainable.shape[2], lora.a_in.shape[1], lora.a_in.shape[0]
    expected = {
        "a_in": (count, rank, hidden),
        "b_in": (count, width, rank),
        "a_out": (count, rank, inner),
        "b_out": (count, hidden, rank),
    }
    for name, shape in expected.items():
        factor: Tensor = getattr(lora, name)
        if factor.shape != shape or count > slots:
            raise ValueError(f"lora.{name} is {_what(factor)}; it must be {shape} with at most {slots} slots")
        _check_like(f"lora.{name}", factor, x_TH)
    if isinstance(lora.scale, Tensor) and lora.scale.shape not in ((), (count,)):
        raise ValueError(f"lora.scale is {_what(lora.scale)}; it must be a number or of shape ({count},)")
    base = lora.base_of_slot_B
    if base is not None and (base.dtype != torch.int64 or base.shape != (slots,)):
        raise ValueError(f"lora.base_of_slot_B is {_what(base)}; it must be int64 of shape ({slots},)")


def _check_like(name: str, value: Tensor, x_TH: Tensor) -> None:
    if value.dtype != x_TH.dtype or value.device != x_TH.device:
        raise ValueError(f"{name} is {value.dtype} on {value.device}, x_TH {x_TH.dtype} on {x_TH.device}; convert one")


def _what(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
