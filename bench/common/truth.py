"""What y and every gradient of a problem are, in float64: expert by expert in torch, on whatever device it lies on.

`reference.py` is slower by far and runs on a CPU; on a small problem this file is held to it (`check_truth`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.common.cases import Problem, redrawn
from bench.common.peers import Outcome, errors
from fedmoe_kernels import reference

# Rows of one expert that are worked on at once: bounds the float64 temporaries (0.9 GB each at F = 28672).
_ROWS = 4096


def truth(task: Problem, *, keep: torch.dtype = torch.float32) -> Outcome:
    """Compute y, dx, ds and the gradients of the trainable experts' stacks by ascending id, kept in `keep`.

    The tensors of the problem are taken at the values they hold, so what is compared is the arithmetic alone. The
    order of sums is not fixed on a GPU; in float64 that shows at 1e-15.
    """
    wide = {name: getattr(task, name).double() for name in ("x_TH", "dy_TH", "weights_TK")}
    found = {"y": torch.zeros_like(wide["x_TH"]), "dx": torch.zeros_like(wide["x_TH"])}
    found["ds"] = torch.zeros_like(wide["weights_TK"])
    trained = task.trainable_E.nonzero().flatten().tolist()
    stacks = {n: t.new_zeros(len(trained), *t.shape[1:], dtype=keep) for n, t in task.stacks.items() if trained}
    for e in range(task.shape.E):
        grads = _expert(task, e, wide, found, learns=e in trained)
        for name, grad in grads.items():
            stacks[name][trained.index(e)] = grad.to(keep)
    return {n: t.to(keep) for n, t in found.items()} | {f"d{n}": t for n, t in stacks.items()}


def _expert(task: Problem, e: int, wide: Outcome, found: Outcome, *, learns: bool) -> Outcome:
    """Add one expert's rows to `found`; return the gradients of its weights, nothing when it is frozen or idle."""
    token_N, choice_N = (task.experts_TK == e).nonzero(as_tuple=True)
    if len(token_N) == 0:
        return {}
    leaves = {name: full[e].double().requires_grad_(learns) for name, full in task.stacks.items()}
    for at in range(0, len(token_N), _ROWS):
        token_n, choice_n = token_N[at : at + _ROWS], choice_N[at : at + _ROWS]
        x_nH = wide["x_TH"][token_n].requires_grad_()
        s_n = wide["weights_TK"][token_n, choice_n].requires_grad_()
        out_nH = s_n[:, None] * _mlp(x_nH, leaves, task.shape.activation)
        out_nH.backward(wide["dy_TH"][token_n])
        assert x_nH.grad is not None
        assert s_n.grad is not None
        found["y"].index_add_(0, token_n, out_nH.detach())
        found["dx"].index_add_(0, token_n, x_nH.grad)
        found["ds"][token_n, choice_n] = s_n.grad
    return {name: value.grad for name, value in leaves.items() if value.grad is not None}


def _mlp(x_nH: Tensor, leaves: dict[str, Tensor], activation: str) -> Tensor:
    z_nF = x_nH @ leaves["w_in"].t()
    z_nF = z_nF + leaves["bias_in"] if "bias_in" in leaves else z_nF
    out_nH = reference.activate(z_nF, activation) @ leaves["w_out"].t()
    return out_nH + leaves["bias_out"] if "bias_out" in leaves else out_nH


def check_truth(task: Problem) -> dict[str, float]:
    """Return relative errors of `truth` against `reference.moe_mlp` and autograd in float64 on CPU, by name."""
    small = redrawn(task, 1)
    leaves = {name: full.detach().cpu().double().requires_grad_() for name, full in small.stacks.items()}
    x_TH, s_TK = (t.cpu().double().requires_grad_() for t in (small.x_TH, small.weights_TK))
    y_TH = reference.moe_mlp(
        x_TH,
        small.experts_TK.cpu(),
        s_TK,
        leaves["w_in"],
        leaves["w_out"],
        activation=small.shape.activation,
        bias_in=leaves.get("bias_in"),
        bias_out=leaves.get("bias_out"),
    )
    y_TH.backward(small.dy_TH.cpu().double())
    ids = small.trainable_E.cpu().nonzero().flatten()
    want = {"y": y_TH.detach(), "dx": x_TH.grad, "ds": s_TK.grad}
    want |= {f"d{n}": value.grad[ids] for n, value in leaves.items() if value.grad is not None and len(ids)}
    got = {name: value.cpu() for name, value in truth(small, keep=torch.float64).items()}
    return errors(got, {name: value for name, value in want.items() if value is not None})
