"""`moe_mlp`, the differentiable mixture of experts over compact slots: from its arguments to the operator.

Shapes: T tokens, K top-k, B slots, H hidden, I intermediate, F = 2 * I for gated activations and I for the others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedmoe_kernels import reference
from fedmoe_kernels.backends import WORTH_SAYING, warn_once
from fedmoe_kernels.experts import checks, ops
from fedmoe_kernels.experts.op_inputs import WEIGHTS, OpInputs
from fedmoe_kernels.experts.scores import ExpertScores
from fedmoe_kernels.experts.weights import ExpertLora, ExpertWeights, Stack, stacked
from fedmoe_kernels.routing.record import Routing


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
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return y[t] = sum over token t's rows of weight * (w_out @ f(w_in @ x[t] + bias_in) + bias_out), shape (T, H).

    Differentiable by x, `routing.weights_TK`, trainable weights and biases, adapter factors. Exact for any routing:
    slots without a row get zero gradients, places without a row count nowhere. Two runs with the same inputs and
    threads give the same bits. Under torch.autocast, x and all weights are cast to the autocast dtype, at every call:
    keep frozen experts in that dtype (`ExpertWeights`), where nothing is left to cast. One host read of
    `routing.offsets_B1` per call and direction in the slot loops; the kernels read nothing back.

    Args:
        x_TH: tokens; float32, float64, bfloat16 or float16.
        routing: which token goes to which slot, for this x; its weights may have any floating dtype.
        w_in: (B, F, H), gated forms as [gate; up]. Dtype of x. Weights that are not contiguous, or on a GPU do not
            start at a multiple of 16 bytes, are copied at every call, with one warning that says so.
        w_out: (B, H, I).
        activation: "swiglu", "geglu", "geglu_tanh", "swiglu_oai", "swiglu_clamped", "relu", "relu2", "gelu",
            "gelu_tanh", "silu"; formulas in `reference.activate`. The two that clamp take a limit of their own, as in
            "swiglu_clamped:12".
        bias_in, bias_out: (B, F) and (B, H), in the same form (tensor or ExpertWeights) as the weights.
        trainable_B: for plain tensors, bool (B,): slots outside it get no weight gradient; the gradient tensor is
            full-sized and zero there. With `lora` it picks the adapters that learn.
        lora: adapters; the weights and biases must then be frozen.
        scores: importance sums to add to in the backward; the forward measures its part where a backward can follow.
        recompute: keep no activations between the forward and the backward, which then makes z again from x: the same
            bits for one more first product; R * F values less.
        backend: "auto" takes the Triton kernels for tensors on a GPU that can run them, and the slot loops of `cpu/`
            for all others (on a GPU with one warning that says why). "triton" insists, on CPU tensors under
            TRITON_INTERPRET=1; "cpu" means the slot loops anywhere; "reference" the loops of `reference.py`.

    Returns:
        (T, H) in the dtype of x.

    Raises:
        ValueError: names the argument that does not fit the others.

    Example:
        >>> import torch
        >>> from fedmoe_kernels import route
        >>> routing = route(torch.zeros(1, 2), 2)  # one token, sent to both of two experts by halves
        >>> w_in, w_out = torch.ones(2, 3, 2), torch.ones(2, 2, 3)
        >>> moe_mlp(torch.ones(1, 2), routing, w_in, w_out, activation="relu")
        tensor([[6., 6.]])
    """
    stacks = stacked(w_in=w_in, w_out=w_out, bias_in=bias_in, bias_out=bias_out)
    checks.check_call(x_TH, activation, backend, scores)
    slots = checks.check_routing(x_TH, routing)
    checks.check_stacks(x_TH, stacks, activation)
    checks.check_slots(slots, stacks, trainable_B, lora, scores)
    x_TH, stacks, lora = _autocast(x_TH, stacks, lora)
    for stack in stacks.values():
        checks.check_stack_like(stack, x_TH)
    if lora is not None:
        checks.check_lora(x_TH, stacks, lora, slots)
    if backend == "reference":
        return _by_reference(x_TH, routing, stacks, activation, trainable_B, lora)
    tensors = _tensors(x_TH, routing, stacks, trainable_B, lora)
    leaf_B7 = scores.operand() if scores is not None and torch.is_grad_enabled() else None
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, leaf_B7))
    keep_z = differentiable and not recompute
    frozen_format = stacks["w_in"].format or stacks["w_out"].format
    return ops.moe_mlp(*tensors, leaf_B7, activation, frozen_format, keep_z, backend, routing.rows_per_slot or 0)[0]


def _tensors(
    x_TH: Tensor, routing: Routing, stacks: dict[str, Stack], trainable_B: Tensor | None, lora: ExpertLora | None
) -> list[Tensor | None]:
    """The operator's tensors, in the order of `OpInputs`."""
    given = [stacks.get(name) for name in ("w_in", "w_out", "bias_in", "bias_out")]
    parts = [(None, None, None, None) if stack is None else stack.storage for stack in given]
    adapter: list[Tensor | None] = [None] * 6
    if lora is not None:
        adapter = [lora.a_in, lora.b_in, lora.a_out, lora.b_out, _scales(lora, x_TH.device)]
        adapter.append(lora.base_of_slot_B)
    tensors = [
        x_TH,
        *(routing.weights_TK, routing.rows_TK, routing.tokens_R, routing.places_R, routing.offsets_B1),
        *(part[0] for part in parts),
        *(part[1] for part in parts),
        *(part[2] for part in parts[:2]),
        *(part[3] for part in parts[:2]),
        *adapter,
        trainable_B,
    ]
    if all(t is None or t.is_contiguous() for t in tensors):
        return tensors
    _say_what_is_copied(tensors)
    return [None if t is None else t.contiguous() for t in tensors]


def _say_what_is_copied(tensors: list[Tensor | None]) -> None:
    """Warn once of weights that are laid out again at every call; not while compiling, where a copy may be fused."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in zip(OpInputs._fields, tensors, strict=True):
        if name in WEIGHTS and tensor is not None and not tensor.is_contiguous() and tensor.nbytes >= WORTH_SAYING:
            warn_once(f"{name} is not contiguous, and its {tensor.nbytes} bytes are copied at every call; store it so")


def _scales(lora: ExpertLora, device: torch.device) -> Tensor:
    """(Bl,) float64; a number is filled in on the device, because a copy could not be part of a CUDA graph."""
    count, scale = lora.a_in.shape[0], lora.scale
    if isinstance(scale, Tensor) and scale.device.type == "cpu" and not (scale.dim() or torch.compiler.is_compiling()):
        scale = float(scale)
    if isinstance(scale, Tensor):
        return scale.detach().to(device, torch.float64).expand(count)
    return torch.full((count,), scale, dtype=torch.float64, device=device)


def _by_reference(
    x_TH: Tensor,
    routing: Routing,
    stacks: dict[str, Stack],
    activation: str,
    trainable_B: Tensor | None,
    lora: ExpertLora | None,
) -> Tensor:
    def whole(stack: Stack | None) -> Tensor | None:
        if stack is None:
            return None
        return _learn_only(stack.whole(), trainable_B) if lora is None else stack.whole()

    if lora is not None:
        lora = _pad(lora, routing.num_slots, trainable_B)
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


def _pad(lora: ExpertLora, slots: int, trainable_B: Tensor | None) -> ExpertLora:
    """Adapters of zero for the slots that have none, and constants for those that may not learn."""

    def padded(factor: Tensor) -> Tensor:
        return torch.cat([factor, factor.new_zeros(slots - factor.shape[0], *factor.shape[1:])])

    def whole(factor: Tensor) -> Tensor:
        return _learn_only(padded(factor), trainable_B)

    scale_B = padded(torch.as_tensor(lora.scale, dtype=lora.a_in.dtype).expand(lora.a_in.shape[0]))
    return ExpertLora(
        whole(lora.a_in), whole(lora.b_in), whole(lora.a_out), whole(lora.b_out), scale_B, lora.base_of_slot_B
    )


def _learn_only(stack: Tensor, trainable_B: Tensor | None) -> Tensor:
    if trainable_B is None:
        return stack
    return torch.where(trainable_B.view(-1, *[1] * (stack.dim() - 1)), stack, stack.detach())


def _say_what_is_cast(stacks: dict[str, Stack], dtype: torch.dtype) -> None:
    """Warn once of frozen experts that autocast converts at every call, though they never change."""
    if torch.compiler.is_compiling():
        return
    for stack in stacks.values():
        frozen = stack.frozen
        if isinstance(frozen, Tensor) and frozen.dtype != dtype and frozen.nbytes >= WORTH_SAYING:
            warn_once(
                f"the frozen part of {stack.name} is {frozen.dtype}, and autocast converts its {frozen.nbytes} bytes "
                f"at every call; keep it in {dtype}"
            )


def _autocast(
    x_TH: Tensor, stacks: dict[str, Stack], lora: ExpertLora | None
) -> tuple[Tensor, dict[str, Stack], ExpertLora | None]:
    """Operators registered from Python know no autocast, so cast by hand; the routing weights keep their dtype."""
    kind = x_TH.device.type
    if kind == "meta" or x_TH.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x_TH, stacks, lora
    dtype = torch.get_autocast_dtype(kind)
    _say_what_is_cast(stacks, dtype)
    cast = {name: stack.cast(dtype) for name, stack in stacks.items()}
    if lora is not None:
        lora = replace(
            lora,
            a_in=lora.a_in.to(dtype),
            b_in=lora.b_in.to(dtype),
            a_out=lora.a_out.to(dtype),
            b_out=lora.b_out.to(dtype),
        )
    return x_TH.to(dtype), cast, lora
