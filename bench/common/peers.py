"""The contenders: fedmoe, torch's grouped_mm by hand, the experts of transformers, one dense product of equal FLOPs.

Each is bound once to the weights of a problem, in its own layout, and then runs the tokens of that problem and of
all that share its weights. Making the routing record is part of fedmoe's forward, as sorting is part of its peers'.
Peers from other packages are in peers_optional.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as tnf
from torch import Tensor

from bench.common.cases import Problem, Shape
from fedmoe_kernels import ExpertWeights, Routing, SlotMap, moe_mlp

Outcome = dict[str, Tensor]
Step = Callable[[], Outcome]


def _backward(y_TH: Tensor, dy_TH: Tensor) -> None:
    y_TH.backward(dy_TH)


def _never(task: Problem) -> str | None:
    return None


class Bound(NamedTuple):
    """A contender with its weights in place.

    Attributes:
        forward: (task, x_TH, weights_TK) -> y_TH, on any task with these weights.
        leaves: by the names of `Problem.stacks`, or others, what gets a gradient.
        in_order: gradients of `leaves` by name -> those of the trainable experts by ascending id, in moe_mlp's layout.
        held: bytes of weights that this contender has to keep.
        backward: (y_TH, dy_TH) -> None.
    """

    forward: Callable[[Problem, Tensor, Tensor], Any]
    leaves: dict[str, Tensor]
    in_order: Callable[[Outcome], Outcome]
    held: int
    backward: Callable[[Any, Tensor], None] = _backward


@dataclass(frozen=True)
class Contender:
    """A contender that runs, named exactly as it is run.

    Attributes:
        name: short and stable; rows of results are keyed by it.
        detail: package, version and entry point.
        bind: problem -> Bound.
        refuses: problem -> why it cannot or need not run that, None = it runs.
        stores_all: whether it must hold all experts, whatever is permitted.
        compares: whether it computes y and the gradients (the dense product does not).
        risky: whether it may take the process down; then the attempt is written down before it is made.
        waits: whether it reads from the device in a step, so that no CUDA graph can be made of it.
        graphed: whether its step is the replay of a graph already.
        backward: whether it has one; without one its forward keeps nothing, and is not held against those that do.
    """

    name: str
    detail: str
    bind: Callable[[Problem], Bound]
    refuses: Callable[[Problem], str | None] = _never
    stores_all: bool = True
    compares: bool = True
    risky: bool = False
    waits: bool = False
    graphed: bool = False
    backward: bool = True


def fedmoe(backend: str = "auto", *, recompute: bool = False) -> Contender:
    """Run moe_mlp on compact storage: permitted experts only, gradients for trainable ones only."""

    def bind(task: Problem) -> Bound:
        slot_map = SlotMap.build(task.permitted_E, task.trainable_E)
        ids_B, count = slot_map.expert_of_slot_B, int(task.trainable_E.sum())
        held = {name: full[ids_B] for name, full in task.stacks.items()}
        leaves = {name: leaf(stack[:count]) for name, stack in held.items()}
        stored = {name: ExpertWeights(leaves[name], stack[count:].clone()) for name, stack in held.items()}
        bias_in, bias_out = stored.get("bias_in"), stored.get("bias_out")
        routed = "triton" if backend == "triton" else "auto"

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            routing = Routing.from_topk(task.experts_TK, s_TK, slot_map, backend=routed)
            return moe_mlp(
                x_TH,
                routing,
                stored["w_in"],
                stored["w_out"],
                activation=task.shape.activation,
                bias_in=bias_in,
                bias_out=bias_out,
                recompute=recompute,
                backend=backend,
            )

        return Bound(forward, leaves, lambda grads: grads, total_bytes(held))

    name = "fedmoe-recompute" if recompute else "fedmoe"
    detail = f"fedmoe_kernels.moe_mlp, backend {backend!r}{', recompute=True' if recompute else ''}"
    return Contender(name, detail, bind, stores_all=False)


def activate(z_F: Tensor, activation: str) -> Tensor:
    """Apply the activation by torch's own fused functions; the formulas are those of `reference.activate`."""
    if activation == "relu":
        return tnf.relu(z_F)
    gate, up = z_F.chunk(2, dim=-1)
    if activation == "swiglu":
        return tnf.silu(gate) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def grouped_mm(*, compact: bool = False) -> Contender:
    """Run torch.nn.functional.grouped_mm between a gather and a weighted sum, as one writes it by hand.

    Full storage; or with `compact` only the permitted experts, which no peer does by itself: it shows what is left of
    fedmoe's lead when one does.
    """

    def bind(task: Problem) -> Bound:
        held = task.permitted_E if compact else torch.ones_like(task.permitted_E)
        place_E, count = held.cumsum(0) - 1, int(held.sum())
        trains = bool(task.trainable_E.any())
        stacks = {n: full[held] for n, full in task.stacks.items()} if compact else task.stacks
        leaves = {name: full.detach().requires_grad_(trains) for name, full in stacks.items()}
        w_in, w_out = leaves["w_in"].transpose(-2, -1), leaves["w_out"].transpose(-2, -1)
        trained = task.trainable_E[held].nonzero().flatten()

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            shape = task.shape
            slot_R, order_R = place_E[task.experts_TK.flatten()].sort(stable=True)
            ends = torch.searchsorted(slot_R, torch.arange(1, count + 1, device=slot_R.device))
            offs = ends.to(torch.int32)
            z_RF = tnf.grouped_mm(x_TH.index_select(0, order_R // shape.K), w_in, offs=offs)
            if "bias_in" in leaves:
                z_RF = z_RF + leaves["bias_in"][slot_R]
            row_RH = tnf.grouped_mm(activate(z_RF, shape.activation), w_out, offs=offs)
            if "bias_out" in leaves:
                row_RH = row_RH + leaves["bias_out"][slot_R]
            place_RH = torch.empty_like(row_RH).index_copy(0, order_R, row_RH).view(shape.T, shape.K, shape.H)
            return torch.bmm(s_TK.to(place_RH.dtype)[:, None], place_RH)[:, 0]

        def in_order(grads: Outcome) -> Outcome:
            return {name: grad[trained] for name, grad in grads.items()}

        return Bound(forward, leaves, in_order, total_bytes(leaves))

    def refuses(task: Problem) -> str | None:
        return "all experts are permitted: the same as grouped_mm" if compact and task.permitted_E.all() else None

    name = "grouped_mm-compact" if compact else "grouped_mm"
    detail = f"torch {torch.__version__} nn.functional.grouped_mm, gather and sum by hand"
    return Contender(name, detail, bind, refuses, stores_all=not compact)


def transformers_experts(implementation: str) -> Contender:
    """Run transformers' experts module that has the shape's activation, with "eager" or "grouped_mm".

    Raises:
        ImportError: without transformers.
    """
    import transformers  # half of what this file serves works without it

    def bind(task: Problem) -> Bound:
        module, names = _module(task.shape, implementation)
        interleaved = task.shape.activation == "swiglu_oai"
        stacks = {n: _to_gpt_oss(n, full) for n, full in task.stacks.items()} if interleaved else task.stacks
        trains = bool(task.trainable_E.any())
        leaves = {names[n]: torch.nn.Parameter(full, requires_grad=trains) for n, full in stacks.items()}
        for parameter, value in leaves.items():
            setattr(module, parameter, value)

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            return module(x_TH, task.experts_TK, s_TK.to(x_TH.dtype))

        def in_order(grads: Outcome) -> Outcome:
            named = {n: grads[p] for n, p in names.items() if p in grads}
            return trained_only(task)({n: _of_gpt_oss(n, g) if interleaved else g for n, g in named.items()})

        return Bound(forward, leaves, in_order, total_bytes(leaves))

    detail = f"transformers {transformers.__version__} experts, implementation {implementation!r}"
    return Contender(f"transformers-{implementation}", detail, bind, waits=implementation == "eager")


def _module(shape: Shape, implementation: str) -> tuple[Any, dict[str, str]]:
    """Make an experts module without memory, and find its parameter for each name in `Problem.stacks`."""
    names = {"w_in": "gate_up_proj", "w_out": "down_proj"}
    if shape.activation == "swiglu":
        from transformers.models.qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config = Qwen3MoeConfig(hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts=shape.E)
    elif shape.activation == "swiglu_oai":
        from transformers.models.gpt_oss import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = GptOssConfig(hidden_size=shape.H, intermediate_size=shape.I, num_local_experts=shape.E)
        names |= {"bias_in": "gate_up_proj_bias", "bias_out": "down_proj_bias"}
    else:
        from transformers.models.nemotron_h import NemotronHConfig
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        config = NemotronHConfig(
            hidden_size=shape.H, moe_intermediate_size=shape.I, n_routed_experts=shape.E, mlp_hidden_act="relu"
        )
        names["w_in"] = "up_proj"
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Experts(config), names


def _to_gpt_oss(name: str, full: Tensor) -> Tensor:
    """gpt-oss keeps gate and up in turn along its last axis, and both matrices transposed."""
    if name.endswith("_in"):
        full = in_turn(full)
    return full.transpose(-2, -1).contiguous() if full.dim() == 3 else full


def _of_gpt_oss(name: str, grad: Tensor) -> Tensor:
    if grad.dim() == 3:
        grad = grad.transpose(-2, -1)
    return halves(grad) if name.endswith("_in") else grad


def in_turn(w_in: Tensor) -> Tensor:
    """Turn [gate; up] (E, 2I, ...) into gate and up row by row."""
    return torch.stack(w_in.chunk(2, dim=1), dim=2).flatten(1, 2)


def halves(grad: Tensor) -> Tensor:
    """Turn gate and up row by row back into [gate; up]."""
    return torch.cat([grad[:, ::2], grad[:, 1::2]], dim=1)


def dense() -> Contender:
    """The six products of a dense MLP over all R rows by torch.mm, the two for weights over trainable experts' rows:
    no gather, activation or routing, every result in a ready buffer."""

    def bind(task: Problem) -> Bound:
        shape, like = task.shape, task.x_TH
        rows = shape.T * shape.K
        trained = round(rows * task.tau)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, device=like.device).to(like.dtype)

        x, dz, h, dy = (randn(rows, n) for n in (shape.H, shape.F, shape.I, shape.H))
        w_in, w_out = randn(shape.F, shape.H), randn(shape.H, shape.I)
        z, y, dh, dx = (like.new_empty(rows, n) for n in (shape.F, shape.H, shape.I, shape.H))
        dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)

        def forward(*_: Any) -> None:
            torch.mm(x, w_in.t(), out=z)
            torch.mm(h, w_out.t(), out=y)

        def backward(*_: Any) -> None:
            torch.mm(dy, w_out, out=dh)
            torch.mm(dz, w_in, out=dx)
            if trained:
                torch.mm(dy[:trained].t(), h[:trained], out=dw_out)
                torch.mm(dz[:trained].t(), x[:trained], out=dw_in)

        return Bound(forward, {}, lambda grads: grads, total_bytes({"in": w_in, "out": w_out}), backward)

    return Contender("dense", f"torch {torch.__version__} mm, six dense products", bind, compares=False)


def step(contender: Contender, task: Problem) -> Step:
    """Run forward and backward once, from new leaves: y, dx, ds, and dw_in, ... of trainable experts, if any."""
    bound = contender.bind(task)
    x_TH, s_TK = leaf(task.x_TH), leaf(task.weights_TK)

    def run() -> Outcome:
        forget(bound, x_TH, s_TK)
        y_TH = bound.forward(task, x_TH, s_TK)
        if contender.backward:
            bound.backward(y_TH, task.dy_TH)
        return outcome(bound, y_TH, x_TH, s_TK) if contender.compares else {}

    return run


def outcome(bound: Bound, y_TH: Tensor, x_TH: Tensor, s_TK: Tensor) -> Outcome:
    """Return what a finished forward and backward left; a gradient that is missing is missing here."""
    grads = {name: value.grad for name, value in bound.leaves.items() if value.grad is not None}
    found = {"y": y_TH.detach(), "dx": x_TH.grad, "ds": s_TK.grad}
    found |= {f"d{name}": grad for name, grad in bound.in_order(grads).items() if grad.shape[0]}
    return {name: value for name, value in found.items() if value is not None}


def errors(got: Outcome, want: Outcome) -> dict[str, float]:
    """Return every wanted tensor's relative L2 error; inf where one is missing, nan where one is not finite."""
    found = {}
    for name, value in want.items():
        if name not in got or got[name].shape != value.shape:
            found[name] = float("inf")
            continue
        wide = torch.promote_types(value.dtype, torch.float32)
        error, size = _norm(got[name].to(value.device, wide) - value), _norm(value)
        found[name] = error / size if size else error
    return found


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def check(task: Problem, ours: Step, peer: Step) -> None:
    """Raise unless fedmoe's step gives what the peer's does, in relative L2 norm, tensor by tensor."""
    for name, error in errors(ours(), peer()).items():
        if not error < 1e-4:
            raise AssertionError(f"{task.shape.name}/{task.case.name}: {name} is off by {error:.1e}")


def trained_only(task: Problem) -> Callable[[Outcome], Outcome]:
    """Cut full-sized gradients to those of the trainable experts."""
    ids = task.trainable_E.nonzero().flatten()
    return lambda grads: {name: grad[ids] for name, grad in grads.items()}


def shared(task: Problem) -> dict[str, Tensor]:
    """Make leaves on the problem's own memory, frozen whole where no expert trains: all that most peers can do."""
    trains = bool(task.trainable_E.any())
    return {name: full.detach().requires_grad_(trains) for name, full in task.stacks.items()}


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def forget(bound: Bound, *leaves: Tensor) -> None:
    for value in (*bound.leaves.values(), *leaves):
        value.grad = None


def total_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
