"""The peer that has a forward pass only: OpenAI's triton_kernels, of the repository of Triton, by either of its APIs.

Up to the one that goes with triton 3.6 its product is `matmul_ogs`, which takes a record of the routing and sums over
the choices of a token itself. From then on it is `matmul`, which takes plain indices, and `reduce` sums. Both get the
routing that all contenders get, and make their index of it in the forward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common.cases import Problem
from bench.common.peers import Bound, Contender, activate, total_bytes

_LATER, _EARLIER = "triton_kernels.matmul", "triton_kernels.matmul_ogs"
_NEEDED = {_LATER: ("matmul",), _EARLIER: ("matmul_ogs", "RoutingData", "GatherIndx", "ScatterIndx")}


class Order(NamedTuple):
    """Rows sorted by expert, R = T * K; a place is p = t * K + j.

    Attributes:
        place_R: place of each row, int32.
        row_R: row of each place, int32.
        weight_R: routing weight of each row, in the dtype of the tokens.
        sizes_E: rows of each expert, int32.
        ragged: the package's own record of where each expert's rows lie.
    """

    place_R: Tensor
    row_R: Tensor
    weight_R: Tensor
    sizes_E: Tensor
    ragged: Any


def triton_kernels() -> Contender:
    """Run triton_kernels without gradients, its activation torch's own, for its fused one is gpt-oss's.

    Raises:
        ImportError: where it is not installed, or has neither of the two interfaces; says what is missing.
    """
    tensor, module = importlib.import_module("triton_kernels.tensor"), _module()
    if not hasattr(tensor, "make_ragged_tensor_metadata"):
        raise ImportError("triton_kernels.tensor has no make_ragged_tensor_metadata; take it from triton 3.6 or later")
    run = _by_matmul(module) if module.__name__ == _LATER else _by_matmul_ogs(module)

    def bind(task: Problem) -> Bound:
        weights = {name: full.detach().transpose(1, 2) for name, full in task.stacks.items()}

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            with torch.no_grad():
                order = _order(task, s_TK.to(x_TH.dtype), tensor.make_ragged_tensor_metadata)
                return run(task, x_TH, weights, order)

        return Bound(forward, {}, lambda grads: grads, total_bytes(task.stacks))

    def refuses(task: Problem) -> str | None:
        if task.shape.bias or task.shape.activation not in ("swiglu", "relu"):
            return f"runs here with swiglu and relu and without biases, not with {task.shape.activation}"
        return None

    detail = f"{module.__name__}, forward only, without gradients"
    return Contender("triton_kernels", detail, bind, refuses, risky=True, backward=False)


def _module() -> ModuleType:
    """Import whichever interface is there, the later one first.

    Raises:
        ImportError: says what each of them lacks.
    """
    lacks = []
    for name, needed in _NEEDED.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            lacks.append(f"{name} cannot be imported ({error})")
            continue
        missing = [what for what in needed if not hasattr(module, what)]
        if not missing:
            return module
        lacks.append(f"{name} has no {missing[0]}")
    raise ImportError(f"this triton_kernels has another interface: {'; '.join(lacks)}")


def _order(task: Problem, s_TK: Tensor, ragged_of: Callable[[Tensor, int], Any]) -> Order:
    chosen_R = task.experts_TK.flatten()
    place_R = chosen_R.argsort(stable=True)
    row_R = torch.empty_like(place_R).scatter_(0, place_R, torch.arange(len(place_R), device=place_R.device))
    sizes_E = torch.zeros(task.shape.E, dtype=torch.int32, device=chosen_R.device)
    sizes_E.scatter_add_(0, chosen_R, torch.ones_like(chosen_R, dtype=torch.int32))
    ragged = ragged_of(sizes_E, len(place_R))
    return Order(place_R.to(torch.int32), row_R.to(torch.int32), s_TK.flatten()[place_R], sizes_E, ragged)


_Run = Callable[[Problem, Tensor, dict[str, Tensor], Order], Tensor]


def _by_matmul(module: ModuleType) -> _Run:
    reduce = importlib.import_module("triton_kernels.reduce").reduce

    def run(task: Problem, x_TH: Tensor, weights: dict[str, Tensor], order: Order) -> Tensor:
        shape, rows = task.shape, {"a_ragged_metadata": order.ragged}
        z_RF = module.matmul(x_TH, weights["w_in"], None, gather_indx=order.place_R // shape.K, **rows)
        h_RI = activate(z_RF, shape.activation)
        to_place = {"scatter_indx": order.place_R, "gammas": order.weight_R}
        place_RH = module.matmul(h_RI, weights["w_out"], None, **to_place, **rows)
        return reduce(place_RH.view(-1, shape.K, shape.H), dim=1)[0]

    return run


def _by_matmul_ogs(module: ModuleType) -> _Run:
    def run(task: Problem, x_TH: Tensor, weights: dict[str, Tensor], order: Order) -> Tensor:
        shape = task.shape
        record = module.RoutingData(order.weight_R, order.sizes_E, shape.E, shape.K, order.ragged)
        gather, scatter = module.GatherIndx(order.place_R, order.row_R), module.ScatterIndx(order.row_R, order.place_R)
        z_RF = module.matmul_ogs(x_TH, weights["w_in"], None, record, gather_indx=gather)
        h_RI = activate(z_RF, shape.activation)
        to_token = {"scatter_indx": scatter, "gammas": order.weight_R}
        y_TH = module.matmul_ogs(h_RI, weights["w_out"], None, record, **to_token)
        return y_TH.view(-1, shape.H)

    return run
