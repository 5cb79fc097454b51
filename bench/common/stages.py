"""One step of the experts cut into its stages, each to be run again by itself: the same names on a CPU and on a GPU.

On a GPU (and in Triton's interpreter) a stage is the launches that the driver makes for it; on a CPU it is what the
slot loops do for it, over all rows at once where they go tile by tile. The buffers are made once and reused, so a stage
times its work and no allocation; `forward` and `backward` are the whole operator, allocations included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.common.cases import Problem
from bench.common.peers import leaf
from fedmoe_kernels import (
    ExpertLora,
    ExpertScores,
    ExpertWeights,
    Quantized,
    Routing,
    SlotMap,
    activations,
    moe_mlp,
    route,
)
from fedmoe_kernels.backends import can_run_triton
from fedmoe_kernels.cpu import loops, slot
from fedmoe_kernels.cpu.gemm import gemm_for
from fedmoe_kernels.experts import ops
from fedmoe_kernels.experts.op_inputs import DIFFERENTIABLE, OpInputs
from fedmoe_kernels.formats import FORMATS

STAGES = (
    *("route", "route_stats", "route_backward", "place_rows", "up", "down", "combine"),
    *("data_gradient", "input_gradient", "weight_gradient", "forward", "backward"),
)
# What a whole step may be asked for besides: adapters of rank 8 on every slot, frozen experts in fewer bits, z made
# again, importance sums.
FORMS = ("adapters", "int8", "int4", "fp8_e4m3", "mxfp4", "recompute", "scores")
Stage = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Cut:
    """The stages by name, and where those of the forward and backward leave what the operator would return."""

    stages: dict[str, Stage]
    y_TH: Tensor
    dw_in: Tensor
    dw_out: Tensor


def cut(task: Problem) -> Cut:
    """Cut a problem on its device into all stages, with every buffer filled once, so that each can run alone."""
    kernels = can_run_triton(task.x_TH.device) is None
    slot_map = SlotMap.build(task.permitted_E, task.trainable_E)
    inputs = _inputs(task, slot_map)
    made = (_launched if kernels else _looped)(task, inputs)
    backend = "triton" if kernels else "auto"
    logits_TE = leaf(torch.randn(task.shape.T, task.shape.E, device=task.x_TH.device))
    weights_TK = route(logits_TE, task.shape.K, permitted_E=slot_map, backend=backend).weights_TK
    slope_TK = torch.ones_like(weights_TK)

    def routed() -> None:
        route(logits_TE, task.shape.K, permitted_E=slot_map, backend=backend)

    def counted() -> None:
        route(logits_TE, task.shape.K, permitted_E=slot_map, with_stats=True, backend=backend)

    def routed_back() -> None:
        torch.autograd.grad(weights_TK, logits_TE, slope_TK, retain_graph=True)

    def placed() -> None:
        Routing.from_topk(task.experts_TK, task.weights_TK, slot_map, backend=backend)

    forward, backward = _whole(task, slot_map, backend)
    every = {"route": routed, "route_stats": counted, "route_backward": routed_back, "place_rows": placed}
    every |= {**made.stages, "forward": forward, "backward": backward}
    for name in STAGES:
        every[name]()
    return Cut({name: every[name] for name in STAGES}, made.y_TH, made.dw_in, made.dw_out)


def _inputs(task: Problem, slot_map: SlotMap) -> OpInputs:
    """Make the operator's tensors for the compact store, trainable slots first."""
    ids_B, count = slot_map.expert_of_slot_B, int(task.trainable_E.sum())
    record = Routing.from_topk(task.experts_TK, task.weights_TK, slot_map)
    fields = dict.fromkeys(OpInputs._fields) | {"x_TH": task.x_TH}
    fields |= {name: getattr(record, name) for name in OpInputs._fields[1:6]}
    for name, full in task.stacks.items():
        held = full[ids_B]
        fields |= {name: held[:count].clone(), f"{name}_frozen": held[count:].clone()}
    return OpInputs(**fields)


def whole(task: Problem, form: str) -> dict[str, Stage]:
    """Return the operator's two passes in one of the `FORMS`, by name."""
    backend = "triton" if can_run_triton(task.x_TH.device) is None else "auto"
    forward, backward = _whole(task, SlotMap.build(task.permitted_E, task.trainable_E), backend, form)
    return {"forward": forward, "backward": backward}


def _whole(task: Problem, slot_map: SlotMap, backend: str, form: str = "") -> tuple[Stage, Stage]:
    ids_B, count = slot_map.expert_of_slot_B, int(task.trainable_E.sum())
    held = {name: full[ids_B] for name, full in task.stacks.items()}
    x_TH, s_TK = leaf(task.x_TH), leaf(task.weights_TK)
    routing = Routing.from_topk(task.experts_TK, s_TK, slot_map, backend=backend)
    options: dict[str, Any] = {"recompute": form == "recompute", "activation": task.shape.activation}
    options["backend"] = backend
    leaves = [x_TH, s_TK]
    if form == "adapters":
        options |= held
        factors = [leaf(factor) for factor in _factors(task, len(ids_B))]
        options["lora"] = ExpertLora(*factors)
        leaves += factors
    else:
        for name, full in held.items():
            rest: Tensor | Quantized = full[count:].clone()
            if form in FORMATS and name in ("w_in", "w_out"):
                rest = Quantized.of(full[count:], form)
            options[name] = ExpertWeights(leaf(full[:count]), rest)
            leaves += [options[name].trainable] if count else []
    if form == "scores":
        options["scores"] = ExpertScores(len(ids_B), device=x_TH.device)
        leaves.append(options["scores"].leaf_B7)

    def run() -> Tensor:
        return moe_mlp(x_TH, routing, **options)

    y_TH = run()

    def forward() -> None:
        run()

    def backward() -> None:
        torch.autograd.grad(y_TH, leaves, task.dy_TH, retain_graph=True)

    return forward, backward


def _factors(task: Problem, slots: int, rank: int = 8) -> list[Tensor]:
    """a_in, b_in, a_out and b_out of every slot."""
    shape = task.shape
    sizes = ((rank, shape.H), (shape.F, rank), (rank, shape.I), (shape.H, rank))
    return [
        torch.randn(slots, *size, dtype=task.x_TH.dtype, device=task.x_TH.device) / size[1] ** 0.5 for size in sizes
    ]


def _launched(task: Problem, inputs: OpInputs) -> Cut:
    """Cut by the driver's launches, collected instead of started."""
    from fedmoe_kernels.gpu.experts import driver as experts
    from fedmoe_kernels.gpu.launch import Launch

    there: list[Launch] = []
    back: list[Launch] = []
    rows_per_slot = inputs.rows_per_slot(0)
    needs = [True, True, *(name in task.stacks for name in DIFFERENTIABLE[2:]), False]
    how = {"activation": task.shape.activation, "rows_per_slot": rows_per_slot}
    y_TH, z_RF, _ = experts.forward(inputs, keep_z=True, execute=there.append, **how)
    grads = experts.backward(task.dy_TH, z_RF, inputs, needs=needs, execute=back.append, **how)

    def some(launches: list[Launch], *files: str) -> Stage:
        chosen = [launch for launch in launches if launch.kernel.fn.__module__.rsplit(".", 1)[-1] in files]

        def run() -> None:
            for launch in chosen:
                launch.run()

        return run

    for launch in (*there, *back):
        launch.run()
    stages = {
        "up": some(there, "up"),
        "down": some(there, "down"),
        "combine": some(there, "combine"),
        "data_gradient": some(back, "data_gradient", "row_sums"),
        "input_gradient": some(back, "down", "combine"),
        "weight_gradient": some(back, "weight_gradient"),
    }
    found = dict(zip(DIFFERENTIABLE, grads, strict=False))
    return Cut(stages, y_TH, found["w_in"], found["w_out"])


def _looped(task: Problem, inputs: OpInputs) -> Cut:
    """Cut by the products that the slot loops make, over buffers of all rows."""
    shape, gemm, act = task.shape, gemm_for(task.x_TH.dtype), activations.named(task.shape.activation)
    rows = ops.host_rows(inputs)
    N, like = rows.real, task.x_TH
    tokens_N, spans = rows.tokens_R[:N], [slice(a, b) for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]
    experts = ops.slots_of(inputs, "")
    x_NH, dy_NH = like.new_empty(N, shape.H), like.new_empty(N, shape.H)
    z_NF, dz_NF = like.new_empty(N, shape.F), like.new_empty(N, shape.F)
    h_NI, d_NI = like.new_empty(N, shape.I), like.new_empty(N, shape.I)
    y_XH, dx_XH = like.new_zeros(N + 1, shape.H), like.new_zeros(N + 1, shape.H)
    y_TH = torch.empty_like(like)
    s_N1 = inputs.weights_TK.flatten()[rows.places_R[:N]].to(like.dtype).unsqueeze(1)
    named = {name: torch.empty_like(getattr(inputs, name)) for name in task.stacks}
    grads = slot.Gradients(**dict.fromkeys(slot.Gradients._fields) | named)
    busy = [(expert, span) for expert, span in zip(experts, spans, strict=True) if span.start < span.stop]
    learning = [(expert, span) for expert, span in busy if expert.learns]

    def up() -> None:
        torch.index_select(task.x_TH, 0, tokens_N, out=x_NH)
        for expert, span in busy:
            slot.up(gemm, expert, x_NH, span, out_mF=z_NF[span])
        act.forward(z_NF, h_NI)

    def down() -> None:
        for expert, span in busy:
            slot.down(gemm, expert, h_NI, span, out_mH=y_XH[span])

    def combine() -> None:
        y_TH.copy_(loops._combine(y_XH, rows, weighted=True))

    def data_gradient() -> None:
        torch.index_select(task.dy_TH, 0, tokens_N, out=dy_NH)
        for expert, span in busy:
            slot.down_back(gemm, expert, dy_NH, span, out_mI=d_NI[span])
        act.prepare(z_NF, h_NI, dz_NF)
        torch.linalg.vecdot(d_NI, h_NI)
        d_NI.mul_(s_N1)
        act.backward(z_NF, d_NI, dz_NF)
        dy_NH.mul_(s_N1)

    def input_gradient() -> None:
        for expert, span in busy:
            slot.up_back(gemm, expert, dz_NF, span, out_mH=dx_XH[span])
        loops._combine(dx_XH, rows, weighted=False)

    def weight_gradient() -> None:
        for expert in experts:
            slot.clear(expert, grads)
        for expert, span in learning:
            slot.grad_out(gemm, expert, grads, dy_NH[span], h_NI[span], add=False)
            slot.grad_in(gemm, expert, grads, dz_NF[span], x_NH[span], add=False)

    parts = (up, down, combine, data_gradient, input_gradient, weight_gradient)
    return Cut({part.__name__: part for part in parts}, y_TH, named["w_in"], named["w_out"])
