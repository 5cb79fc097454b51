"""What `moe_mlp` refuses, each in one sentence that names the argument: launchers validate, bodies assume."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmoe_kernels.activations import parts, width
from fedmoe_kernels.backends import EXPERT_BACKENDS
from fedmoe_kernels.experts.scores import ExpertScores
from fedmoe_kernels.experts.weights import ExpertLora, Stack, what
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.routing.record import Routing

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(x_TH: Tensor, activation: str, backend: str, scores: ExpertScores | None) -> None:
    if x_TH.dim() != 2 or x_TH.dtype not in _DTYPES:
        raise ValueError(f"x_TH is {what(x_TH)}; it must be a floating (tokens, hidden) matrix")
    parts(activation)  # raises for a name or a limit that does not exist
    if backend not in EXPERT_BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; choose one of {', '.join(EXPERT_BACKENDS)}")
    if backend == "reference" and scores is not None:
        raise ValueError("scores need another backend than 'reference'; for that call reference.importance")
    if x_TH.device.type not in ("cpu", "cuda", "meta") and backend != "reference":
        raise ValueError(f"x_TH is on {x_TH.device}, which has no kernel; move it or use backend='reference'")


def check_routing(x_TH: Tensor, routing: Routing) -> int:
    """Raise unless the record belongs to this x; return B."""
    if routing.rows_TK.shape[0] != x_TH.shape[0] or routing.weights_TK.shape != routing.rows_TK.shape:
        raise ValueError(
            f"routing is of {routing.rows_TK.shape[0]} tokens, x_TH has {x_TH.shape[0]}; route the tokens of this x_TH"
        )
    R = routing.rows_TK.numel()
    index = {"rows_TK": tuple(routing.rows_TK.shape), "tokens_R": (R,), "places_R": (R,)}
    for name, shape in (index | {"offsets_B1": (routing.num_slots + 1,)}).items():
        value: Tensor = getattr(routing, name)
        if value.dtype != torch.int64 or value.shape != shape:
            raise ValueError(f"routing.{name} is {what(value)}; it must be int64 {shape}, as `route` makes it")
        if value.device != x_TH.device:
            raise ValueError(f"routing.{name} is on {value.device}, x_TH on {x_TH.device}; move one of them")
    if routing.num_slots < 1:
        raise ValueError("routing has no slot; permit at least one expert")
    if routing.weights_TK.device != x_TH.device:
        raise ValueError(f"routing.weights_TK is on {routing.weights_TK.device}, x_TH on {x_TH.device}; move one")
    if not routing.weights_TK.is_floating_point():
        raise ValueError(f"routing.weights_TK is {routing.weights_TK.dtype}; the weights must be floating")
    return routing.num_slots


def check_stacks(x_TH: Tensor, stacks: dict[str, Stack], activation: str) -> None:
    w_in, w_out = stacks["w_in"], stacks["w_out"]
    for stack in (w_in, w_out):
        if stack.trainable.dim() != 3 or stack.rows == 0 or 0 in stack.trainable.shape[1:]:
            raise ValueError(f"{stack.name} is {what(stack.trainable)}; it must be 3-D with at least one slot")
    hidden, inner = w_out.trainable.shape[1:]
    wide = width(activation, inner)
    if w_in.format and w_out.format and w_in.format != w_out.format:
        raise ValueError(f"w_in is stored as {w_in.format}, w_out as {w_out.format}; store both in one format")
    if hidden != x_TH.shape[1]:
        raise ValueError(f"w_out is {what(w_out.trainable)}, x_TH has hidden size {x_TH.shape[1]}; w_out is (B, H, I)")
    trainable, rows = w_in.trainable.shape[0], w_in.rows
    expected = {"w_in": (wide, hidden), "w_out": (hidden, inner), "bias_in": (wide,), "bias_out": (hidden,)}
    for name, stack in stacks.items():
        wanted = (trainable, *expected[name])
        if stack.trainable.shape != wanted or stack.rows != rows:
            raise ValueError(
                f"{name} is {what(stack.trainable)} with {stack.rows} slots; {activation!r} with the other arguments "
                f"needs {wanted} and {rows} slots"
            )


def check_slots(
    slots: int,
    stacks: dict[str, Stack],
    trainable_B: Tensor | None,
    lora: ExpertLora | None,
    scores: ExpertScores | None,
) -> None:
    w_in = stacks["w_in"]
    if (lora is None or lora.base_of_slot_B is None) and w_in.rows != slots:
        raise ValueError(
            f"w_in has {w_in.rows} slots, routing {slots}; use the SlotMap that the weights were stored by"
        )
    if trainable_B is not None:
        if trainable_B.dtype != torch.bool or trainable_B.shape != (slots,):
            raise ValueError(f"trainable_B is {what(trainable_B)}; it must be bool of shape ({slots},)")
        if w_in.frozen is not None:
            raise ValueError("trainable_B is given with ExpertWeights, which already say what is trainable; drop it")
        if trainable_B.device != w_in.trainable.device:
            raise ValueError(f"trainable_B is on {trainable_B.device}, w_in on {w_in.trainable.device}; move one")
    if scores is not None and scores.leaf_B7.device != w_in.trainable.device:
        raise ValueError(f"scores is on {scores.leaf_B7.device}, w_in on {w_in.trainable.device}; make it there")
    if scores is not None and scores.num_slots != slots:
        raise ValueError(f"scores has {scores.num_slots} slots, routing {slots}; make one ExpertScores per layer")


def check_lora(x_TH: Tensor, stacks: dict[str, Stack], lora: ExpertLora, slots: int) -> None:
    for stack in stacks.values():
        if stack.trainable.requires_grad:
            raise ValueError(f"{stack.name} requires a gradient under lora; adapters sit on frozen weights, detach it")
    width, hidden = stacks["w_in"].trainable.shape[1:]
    inner = stacks["w_out"].trainable.shape[2]
    if lora.a_in.dim() != 3 or 0 in lora.a_in.shape:
        raise ValueError(f"lora.a_in is {what(lora.a_in)}; it must be 3-D with at least one slot and rank 1")
    count, rank, _ = lora.a_in.shape
    expected = {
        "a_in": (count, rank, hidden),
        "b_in": (count, width, rank),
        "a_out": (count, rank, inner),
        "b_out": (count, hidden, rank),
    }
    for name, shape in expected.items():
        factor: Tensor = getattr(lora, name)
        if factor.shape != shape or count > slots:
            raise ValueError(f"lora.{name} is {what(factor)}; it must be {shape} with at most {slots} slots")
        check_like(f"lora.{name}", factor, x_TH)
    if isinstance(lora.scale, Tensor) and lora.scale.shape not in ((), (count,)):
        raise ValueError(f"lora.scale is {what(lora.scale)}; it must be a number or of shape ({count},)")
    base = lora.base_of_slot_B
    for name, value in (("scale", lora.scale), ("base_of_slot_B", base)):
        # A number on the CPU becomes a tensor where x is; a row of them would be a hidden copy, and a wait, every call.
        if isinstance(value, Tensor) and value.dim() and value.device != x_TH.device:
            raise ValueError(f"lora.{name} is on {value.device}, x_TH on {x_TH.device}; move one of them")
    if base is not None and (base.dtype != torch.int64 or base.shape != (slots,)):
        raise ValueError(f"lora.base_of_slot_B is {what(base)}; it must be int64 of shape ({slots},)")


def check_stack_like(stack: Stack, x_TH: Tensor) -> None:
    """Refuse a stack if the dtype or device of either part is not that of x."""
    check_like(stack.name, stack.trainable, x_TH)
    if isinstance(stack.frozen, Quantized):
        if stack.name.startswith("bias"):
            raise ValueError(f"{stack.name} is quantised; only w_in and w_out may be")
        if stack.frozen.codes.device != x_TH.device:
            raise ValueError(
                f"{stack.name}'s frozen part is on {stack.frozen.codes.device}, x_TH on {x_TH.device}; move one of them"
            )
    elif stack.frozen is not None:
        check_like(f"{stack.name}'s frozen part", stack.frozen, x_TH)


def check_like(name: str, value: Tensor, x_TH: Tensor) -> None:
    if value.dtype != x_TH.dtype or value.device != x_TH.device:
        raise ValueError(f"{name} is {value.dtype} on {value.device}, x_TH {x_TH.dtype} on {x_TH.device}; convert one")
