"""The contenders: fedmoe, the experts of transformers in two implementations, and one dense product of equal FLOPs.

Each is a step() that runs forward and backward once and returns (y, dx, d weights_TK, dW_in, dW_out) in global expert
order, None for what a contender does not compute. Making the routing record is part of fedmoe's step, as sorting is
part of its peers'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Problem
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fedmoe_kernels import ExpertWeights, Routing, SlotMap, moe_mlp

Outcome = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Step = Callable[[], Outcome]


def fedmoe(problem: Problem) -> Step:
    """moe_mlp on compact storage: permitted experts only, gradients for trainable ones only."""
    slot_map = SlotMap.build(problem.permitted_E, problem.trainable_E)
    expert_B = slot_map.expert_of_slot_B
    count = int(problem.trainable_E.sum())

    def stored(full: Tensor) -> ExpertWeights:
        held = full[expert_B]
        return ExpertWeights(held[:count].clone().requires_grad_(), held[count:].clone())

    x_TH, s_TK = _leaf(problem.x_TH), _leaf(problem.weights_TK)
    w_in, w_out = stored(problem.w_in), stored(problem.w_out)

    def step() -> Outcome:
        _forget(x_TH, s_TK, w_in.trainable, w_out.trainable)
        routing = Routing.from_topk(problem.experts_TK, s_TK, slot_map)
        y_TH = moe_mlp(x_TH, routing, w_in, w_out)
        y_TH.backward(problem.dy_TH)
        return y_TH.detach(), *_grads(x_TH, s_TK, w_in.trainable, w_out.trainable)

    return step


def transformers_experts(problem: Problem, implementation: str) -> Step:
    """Qwen3MoeExperts with "eager" or "grouped_mm": full storage, every gradient, on the same rows."""
    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    experts = Qwen3MoeExperts(config)
    with torch.no_grad():
        experts.gate_up_proj.copy_(problem.w_in)
        experts.down_proj.copy_(problem.w_out)
    x_TH, s_TK = _leaf(problem.x_TH), _leaf(problem.weights_TK)

    def step() -> Outcome:
        _forget(x_TH, s_TK, experts.gate_up_proj, experts.down_proj)
        y_TH = experts(x_TH, problem.experts_TK, s_TK)
        y_TH.backward(problem.dy_TH)
        return y_TH.detach(), *_grads(x_TH, s_TK, experts.gate_up_proj, experts.down_proj)

    return step


def dense(problem: Problem) -> Callable[[], None]:
    """The six products of a dense MLP over all R rows, two forward and four back, by torch.mm: no gather, activation or
    routing, and every result goes into a ready buffer. R * H * I * 18 FLOPs at the rate that torch.mm has here."""
    rows, H, F, inner = problem.shape.T * problem.shape.K, problem.shape.H, 2 * problem.shape.I, problem.shape.I
    x, dz, h, dy = (torch.randn(rows, n) for n in (H, F, inner, H))
    w_in, w_out = torch.randn(F, H), torch.randn(H, inner)
    z, y, dh, dx = (torch.empty(rows, n) for n in (F, H, inner, H))
    dw_in, dw_out = torch.empty(F, H), torch.empty(H, inner)

    def step() -> None:
        torch.mm(x, w_in.t(), out=z)
        torch.mm(h, w_out.t(), out=y)
        torch.mm(dy, w_out, out=dh)
        torch.mm(dy.t(), h, out=dw_out)
        torch.mm(dz, w_in, out=dx)
        torch.mm(dz.t(), x, out=dw_in)

    return step


def check(problem: Problem, step: Step, peer: Step) -> None:
    """Raise unless fedmoe's step gives what the peer's does: 1e-4 in relative L2 norm, trainable experts' weights."""
    slot_map = SlotMap.build(problem.permitted_E, problem.trainable_E)
    trained = slot_map.expert_of_slot_B[: int(problem.trainable_E.sum())]
    ours, theirs = step(), peer()
    wanted = (*theirs[:3], theirs[3][trained], theirs[4][trained])
    for name, got, want in zip(("y", "dx", "ds", "dw_in", "dw_out"), ours, wanted, strict=True):
        error = float((got - want).norm() / want.norm())
        if not error < 1e-4:
            raise AssertionError(f"{problem.shape.name}/{problem.case.name}: {name} is off by {error:.1e}")


def _leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def _forget(*leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None


def _grads(*leaves: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, s, w_in, w_out = (leaf.grad for leaf in leaves)
    assert x is not None
    assert s is not None
    assert w_in is not None
    assert w_out is not None
    return x, s, w_in, w_out
