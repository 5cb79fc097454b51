"""The operators `fedmoe::moe_mlp` and `fedmoe::moe_mlp_backward`: schemas, shapes, derivative, and which body runs.

Each call goes to the slot loops of `cpu/` or to the Triton kernels of `gpu/experts/`, which are imported when they are
first needed. Both operators assume inputs that `experts.moe_mlp` has checked: contiguous, of one dtype (routing
weights and quantised storage excepted) and on one device.

Their last arguments: `backend` ("auto", "cpu" or "triton") and `rows_per_slot`, what the kernels' tiles are chosen by
(0 = T * K / B of this call). `frozen_format` is a name of `formats.FORMATS`, or "" where no weight is stored in codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedmoe_kernels.activations import named
from fedmoe_kernels.backends import use_triton
from fedmoe_kernels.cpu import loops
from fedmoe_kernels.cpu.slot import Adapter, Expert, Gradients, Packed
from fedmoe_kernels.experts.flops import tell_counters
from fedmoe_kernels.experts.op_inputs import DIFFERENTIABLE, OpInputs
from fedmoe_kernels.experts.scores import finite_only
from fedmoe_kernels.formats import FORMATS
from fedmoe_kernels.operator import Operator, function_of, last_derivative, transformed_of

_OPTIONAL = ("tokens_R", "places_R", *OpInputs._fields[8:])
_TENSORS = ", ".join(f"{'Tensor?' if name in _OPTIONAL else 'Tensor'} {name}" for name in OpInputs._fields)


def host_rows(inputs: OpInputs) -> loops.HostRows:
    rows_TK, tokens_R, places_R = inputs.rows_TK, inputs.tokens_R, inputs.places_R
    if tokens_R is None or places_R is None:
        row_R, R = rows_TK.flatten(), rows_TK.numel()
        place_R = torch.arange(R, device=row_R.device)
        # Places without a row all go to a place past the last row, which is cut off.
        places_R = row_R.new_full((R + 1,), -1).scatter_(0, row_R.where(row_R >= 0, R), place_R)[:R]
        tokens_R = places_R // rows_TK.shape[1]
    return loops.HostRows(inputs.weights_TK, rows_TK, tokens_R, places_R, [int(n) for n in inputs.offsets_B1.tolist()])


def slots_of(inputs: OpInputs, frozen_format: str) -> list[Expert]:
    """One record per slot; every tensor in it is a view."""
    slots = inputs.offsets_B1.shape[0] - 1
    w_in = _matrices(inputs.w_in, inputs.w_in_frozen, inputs.w_in_scale, inputs.w_in_whole, frozen_format)
    w_out = _matrices(inputs.w_out, inputs.w_out_frozen, inputs.w_out_scale, inputs.w_out_whole, frozen_format)
    bias_in, bias_out = (
        [*trainable.unbind(0), *(() if frozen is None else frozen.unbind(0))] if trainable is not None else None
        for trainable, frozen in zip(inputs[8:10], inputs[12:14], strict=True)
    )
    adapters = _adapters(inputs)
    base = list(range(slots)) if inputs.base_of_slot_B is None else inputs.base_of_slot_B.tolist()
    if not all(0 <= index < len(w_in) for index in base):  # a value, so the launcher cannot see it under compile
        raise ValueError(f"lora.base_of_slot_B points outside the {len(w_in)} rows of w_in; give each slot one of them")
    mask = [True] * slots if inputs.trainable_B is None else inputs.trainable_B.tolist()
    weighted = inputs.w_in.shape[0] if inputs.a_in is None else 0  # with adapters the weights are frozen
    return [
        Expert(
            w_in[base[b]],
            w_out[base[b]],
            None if bias_in is None else bias_in[base[b]],
            None if bias_out is None else bias_out[base[b]],
            adapters[b] if b < len(adapters) else None,
            b if mask[b] and b < weighted else None,
            b if mask[b] and b < len(adapters) else None,
        )
        for b in range(slots)
    ]


def _matrices(
    trainable: Tensor, frozen: Tensor | None, scale: Tensor | None, whole: Tensor | None, frozen_format: str
) -> list[Tensor | Packed]:
    matrices: list[Tensor | Packed] = [*trainable.unbind(0)]
    if frozen is not None and scale is not None:
        form, wholes = FORMATS[frozen_format], [None] * len(frozen) if whole is None else whole.unbind(0)
        parts = zip(frozen.unbind(0), scale.unbind(0), wholes, strict=True)
        matrices += [Packed(*part, form) for part in parts]
    elif frozen is not None:
        matrices += frozen.unbind(0)
    return matrices


def _adapters(inputs: OpInputs) -> list[Adapter]:
    if inputs.a_in is None or inputs.b_in is None or inputs.a_out is None or inputs.b_out is None:
        return []
    assert inputs.scale_B is not None
    a_in, b_in, a_out, b_out = (f.unbind(0) for f in (inputs.a_in, inputs.b_in, inputs.a_out, inputs.b_out))
    scales = inputs.scale_B.tolist()
    return [Adapter(a_in[b], b_in[b], a_out[b], b_out[b], scales[b]) for b in range(len(scales))]


def _refusal(inputs: OpInputs) -> str | None:
    """Why the kernels do not serve these inputs, None = they do."""
    x_TH = inputs.x_TH
    if inputs.rows_TK.numel() >= 2**31:
        return f"routing has {inputs.rows_TK.numel()} places, and they number rows in 32 bits; split the tokens"
    if x_TH.dtype == torch.float64:
        return "x_TH is float64, and they compute in float32; cast it"
    if x_TH.dtype == torch.bfloat16 and x_TH.device.type == "cpu":
        return "x_TH is bfloat16, whose raw bits Triton's interpreter would multiply; cast it"
    return None


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (scores_B7, activation, frozen_format, keep_z, backend, rows_per_slot) = OpInputs(*args[:-6]), args[-6:]
    want_reap = scores_B7 is not None
    if use_triton(backend, inputs.x_TH.device, _refusal(inputs), verb="moe_mlp"):
        from fedmoe_kernels.gpu.experts import driver as experts  # here, because it imports triton

        how = {"activation": activation, "frozen_format": frozen_format, "keep_z": keep_z, "want_reap": want_reap}
        with torch.cuda.device_of(inputs.x_TH):  # Triton launches on the current device, whatever its arguments
            return experts.forward(inputs, rows_per_slot=inputs.rows_per_slot(rows_per_slot), **how)
    slots = slots_of(inputs, frozen_format)
    how = {"keep_z": keep_z, "want_reap": want_reap}
    return loops.forward(inputs.x_TH, host_rows(inputs), slots, named(activation), **how)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (scores_B7, _, _, keep_z, _, _) = OpInputs(*args[:-6]), args[-6:]
    rows = inputs.rows_TK.numel() if keep_z else 0
    x_TH, slots = inputs.x_TH, 0 if scores_B7 is None else inputs.offsets_B1.shape[0] - 1
    z_RF, reap_B = x_TH.new_empty(rows, inputs.w_in.shape[1]), x_TH.new_empty(slots, dtype=torch.float32)
    return torch.empty_like(x_TH), z_RF, reap_B


def wanted(inputs: OpInputs, needs: list[bool]) -> list[Tensor]:
    """Make empty buffers for the gradients that are needed, (0,) for the others; the scores' last."""
    like = [getattr(inputs, name) for name in DIFFERENTIABLE]
    buffers = [
        torch.empty_like(tensor) if need else inputs.x_TH.new_empty(0)
        for tensor, need in zip(like, needs[:-1], strict=True)
    ]
    slots = inputs.offsets_B1.shape[0] - 1
    return [*buffers, inputs.x_TH.new_empty((slots, 6) if needs[-1] else (0,), dtype=torch.float32)]


def _backward_fake(dy_TH: Tensor, z_RF: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(wanted(OpInputs(*args[:-5]), args[-3]))


def _backward(dy_TH: Tensor, z_RF: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, (activation, frozen_format, needs, backend, rows_per_slot) = OpInputs(*args[:-5]), args[-5:]
    if use_triton(backend, inputs.x_TH.device, _refusal(inputs), verb="moe_mlp"):
        from fedmoe_kernels.gpu.experts import driver as experts  # here, because it imports triton

        how = {"activation": activation, "frozen_format": frozen_format, "needs": needs}
        with torch.cuda.device_of(inputs.x_TH):
            return experts.backward(dy_TH, z_RF, inputs, rows_per_slot=inputs.rows_per_slot(rows_per_slot), **how)
    return _backward_by_loops((dy_TH, z_RF), inputs, slots_of(inputs, frozen_format), activation, needs)


def _backward_by_loops(
    given: tuple[Tensor, Tensor], inputs: OpInputs, experts: list[Expert], activation: str, needs: list[bool]
) -> tuple[Tensor, ...]:
    dy_TH, z_RF = given
    dx_TH, *buffers = wanted(inputs, [False, *needs[1:]])
    for buffer, adapter in zip(buffers[1:9], [False] * 4 + [True] * 4, strict=True):
        for b in range(buffer.shape[0]):
            if (experts[b].adapter_grad if adapter else experts[b].grad) is None:
                buffer[b].zero_()
    dx = loops.backward(
        dy_TH,
        inputs.x_TH,
        z_RF,
        host_rows(inputs),
        experts=experts,
        activation=named(activation),
        grads=Gradients(*(buffer if need else None for buffer, need in zip(buffers, needs[1:], strict=True))),
        want_x=needs[0],
    )
    return (dx_TH if dx is None else dx, *buffers)


_DEVICES = ("cpu", "cuda")
moe_mlp_op = torch.library.custom_op(
    "fedmoe::moe_mlp",
    _forward,
    mutates_args=(),
    device_types=_DEVICES,
    schema=f"({_TENSORS}, Tensor? scores_B7, str activation, str frozen_format, bool keep_z, str backend, "
    "int rows_per_slot) -> (Tensor, Tensor, Tensor)",
)


moe_mlp_backward_op = torch.library.custom_op(
    "fedmoe::moe_mlp_backward",
    _backward,
    mutates_args=(),
    device_types=_DEVICES,
    schema=f"(Tensor dy_TH, Tensor z_RF, {_TENSORS}, str activation, str frozen_format, bool[] needs, str backend, "
    f"int rows_per_slot) -> ({', '.join(['Tensor'] * (len(DIFFERENTIABLE) + 1))})",
)


moe_mlp_op.register_fake(_forward_fake)


moe_mlp_backward_op.register_fake(_backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, ctx.activation, ctx.frozen_format, _, ctx.backend, ctx.rows_per_slot = inputs
    ctx.save_for_backward(*OpInputs(*tensors).kept, *output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


# Where the arguments of `moe_mlp` are that its derivative is by, in the order of `needs`.
_PLACES = (*map(OpInputs._fields.index, DIFFERENTIABLE), len(OpInputs._fields))


def _differentiate(
    ctx: Any, wanted_of: Sequence[bool], dy_TH: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradient of each argument of `moe_mlp` that `wanted_of` asks for, in order, None for the others."""
    found: list[Tensor | None] = [None] * len(wanted_of)
    if dy_TH is not None:
        *tensors, z_RF, reap_B = ctx.saved_tensors
        needs = [wanted_of[place] for place in _PLACES]
        needs[6:10] = [any(needs[6:10])] * 4  # an adapter's factors are computed together or not at all
        how = (ctx.activation, ctx.frozen_format, needs, ctx.backend, ctx.rows_per_slot)
        outputs = moe_mlp_backward(dy_TH.contiguous(), z_RF, *tensors, *how)
        for place, output in zip(_PLACES, outputs, strict=True):
            found[place] = output if wanted_of[place] else None
        if wanted_of[_PLACES[-1]]:
            found[_PLACES[-1]] = finite_only(outputs[-1], reap_B)
    return tuple(found)


moe_mlp_op.register_autograd(
    lambda ctx, *gradients: _differentiate(ctx, ctx.needs_input_grad, *gradients), setup_context=_setup_context
)


moe_mlp_backward = Operator(
    moe_mlp_backward_op, _backward, transformed=last_derivative("moe_mlp"), announce=tell_counters
)
moe_mlp = Operator(
    moe_mlp_op,
    _forward,
    function_of("MoeMlp", _forward, _setup_context, _differentiate),
    transformed_of("MoeMlpTransformed", _setup_context, _differentiate),
    tell_counters,
)
