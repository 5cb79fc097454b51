"""Problems for the tests of moe_mlp, each solved by the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, Routing, SlotMap, moe_mlp, reference
from fedmoe_kernels.activations import width
from fedmoe_kernels.experts import ops

FACTORS = ("a_in", "b_in", "a_out", "b_out")
# What every body of moe_mlp is held to; as `problem` takes them.
SHAPES = {
    "odd sizes, none a multiple of 16": {"T": 23, "H": 19, "I": 13, "B": 5, "K": 2},
    "one token": {"T": 1, "H": 16, "I": 8, "B": 3, "K": 2},
    "no token": {"T": 0, "H": 16, "I": 8, "B": 3, "K": 2},
    "hidden and intermediate of one": {"T": 5, "H": 1, "I": 1, "B": 2, "K": 1},
    "one slot with all rows": {"T": 40, "H": 24, "I": 16, "B": 4, "K": 1, "routes": "one"},
    "places without a row": {"T": 21, "H": 16, "I": 24, "B": 6, "K": 3, "routes": "gaps"},
    "empty slots": {"T": 15, "H": 16, "I": 8, "B": 7, "K": 2, "routes": "empty"},
    "no row at all": {"T": 4, "H": 8, "I": 8, "B": 3, "K": 2, "routes": "none"},
}


@dataclass(frozen=True)
class Problem:
    """Float64 inputs of moe_mlp and a random upstream gradient; slots_TK is -1 where there is no row."""

    slots_TK: Tensor
    tensors: dict[str, Tensor]  # x, s, w_in, w_out and, where present, bias_in, bias_out, a_in, b_in, a_out, b_out
    dy_TH: Tensor
    activation: str = "swiglu"
    lora_scale: float = 0.7
    base_of_slot_B: Tensor | None = None

    @property
    def B(self) -> int:
        return (self.base_of_slot_B if self.base_of_slot_B is not None else self.tensors["w_in"]).shape[0]

    def rounded(self, dtype: torch.dtype) -> Problem:
        """The same problem on values that `dtype` holds exactly, so that only the arithmetic is compared."""
        keep = {n: t if n == "s" else t.to(dtype).double() for n, t in self.tensors.items()}
        keep["s"] = keep["s"].float().double() if dtype != torch.float64 else keep["s"]
        return replace(self, tensors=keep, dy_TH=self.dy_TH.to(dtype).double())

    @property
    def slot_map(self) -> SlotMap:
        return SlotMap(torch.arange(self.B), self.B)

    def routing(self, s_TK: Tensor, slot_map: SlotMap | None = None) -> Routing:
        return Routing.from_topk(self.slots_TK, s_TK, slot_map or self.slot_map)


def problem(
    T: int,
    H: int,
    I: int,  # noqa: E741
    B: int,
    K: int,
    *,
    activation: str = "swiglu",
    biases: bool = False,
    rank: int = 0,
    routes: str = "uniform",
    seed: int = 0,
) -> Problem:
    """Draw O(1) data. routes: "uniform"; "one" all rows in slot 0 (K = 1); "gaps" a third of the places without a row;
    "empty" every second slot without rows; "none" no row at all."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    usable = torch.arange(0, B, 2) if routes == "empty" else torch.arange(B)
    choice_TK = torch.rand(T, len(usable), generator=g).topk(K).indices if routes != "one" else torch.zeros(T, K).long()
    slots_TK = usable[choice_TK]
    if routes == "gaps":
        slots_TK = slots_TK.masked_fill(torch.rand(slots_TK.shape, generator=g) < 1 / 3, -1)
    if routes == "none":
        slots_TK = torch.full_like(slots_TK, -1)
    F = width(activation, I)
    tensors = {
        "x": randn(T, H),
        "s": randn(*slots_TK.shape).where(slots_TK >= 0, 0.0),
        "w_in": randn(B, F, H) / H**0.5,
        "w_out": randn(B, H, I) / I**0.5,
    }
    if biases:
        tensors |= {"bias_in": randn(B, F), "bias_out": randn(B, H)}
    if rank:
        tensors |= {"a_in": randn(B, rank, H) / H**0.5, "b_in": randn(B, F, rank)}
        tensors |= {"a_out": randn(B, rank, I) / I**0.5, "b_out": randn(B, H, rank)}
    return Problem(slots_TK, tensors, randn(T, H), activation)


def names(p: Problem) -> list[str]:
    """What the problem can be differentiated by: with adapters the weights and biases are frozen."""
    return [n for n in p.tensors if n in ("x", "s", *FACTORS)] if "a_in" in p.tensors else list(p.tensors)


def truth(p: Problem) -> dict[str, Tensor]:
    """y and every gradient, by the reference in float64."""
    leaves = {name: value.clone().requires_grad_(name in names(p)) for name, value in p.tensors.items()}
    optional = {name: leaves.get(name) for name in ("bias_in", "bias_out")}
    lora = None
    if "a_in" in leaves:
        lora = ExpertLora(*(leaves[n] for n in FACTORS), p.lora_scale, p.base_of_slot_B)
    y = reference.moe_mlp(
        *(leaves["x"], p.slots_TK, leaves["s"], leaves["w_in"], leaves["w_out"]),
        activation=p.activation,
        lora=lora,
        **optional,
    )
    if y.requires_grad:
        y.backward(p.dy_TH)
    grads = {n: torch.zeros_like(leaves[n]) if leaves[n].grad is None else leaves[n].grad for n in names(p)}
    return {"y": y.detach(), **{f"d{n}": grad for n, grad in grads.items()}}


def importance(p: Problem, trainable_B: Tensor | None = None) -> dict[str, Tensor]:
    """The importance sums of the reference."""
    t = p.tensors
    lora = None if "a_in" not in t else ExpertLora(*(t[n] for n in FACTORS), p.lora_scale, p.base_of_slot_B)
    return reference.importance(
        *(p.dy_TH, t["x"], p.slots_TK, t["s"], t["w_in"], t["w_out"]),
        activation=p.activation,
        bias_in=t.get("bias_in"),
        bias_out=t.get("bias_out"),
        lora=lora,
        trainable_B=trainable_B,
    )


def leaves(p: Problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Fresh leaves of the problem in `dtype`; the routing weights are float32 beside half precision."""
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    cast = {n: t.to(wide if n == "s" else dtype) for n, t in p.tensors.items()}
    return {n: t.clone().requires_grad_(n in names(p)) for n, t in cast.items()}


def run(
    p: Problem,
    leaf: dict[str, Tensor],
    *,
    frozen_from: int | None = None,
    trainable_B: Tensor | None = None,
    scores: ExpertScores | None = None,
    recompute: bool = False,
    backend: str = "auto",
    slot_map: SlotMap | None = None,
) -> Tensor:
    """moe_mlp on the leaves; with `frozen_from`, slots from there on are frozen by ExpertWeights."""
    stacks: dict[str, Tensor | ExpertWeights | None] = {
        n: leaf.get(n) for n in ("w_in", "w_out", "bias_in", "bias_out")
    }
    if frozen_from is not None:
        stacks = {
            n: None if t is None else ExpertWeights(t[:frozen_from], t[frozen_from:].detach())
            for n, t in stacks.items()
        }
    lora = ExpertLora(*(leaf[n] for n in FACTORS), p.lora_scale, p.base_of_slot_B) if "a_in" in leaf else None
    return moe_mlp(
        leaf["x"],
        p.routing(leaf["s"], slot_map),
        stacks["w_in"],
        stacks["w_out"],
        activation=p.activation,
        bias_in=stacks["bias_in"],
        bias_out=stacks["bias_out"],
        trainable_B=trainable_B,
        lora=lora,
        scores=scores,
        recompute=recompute,
        backend=backend,
    )


def solve(p: Problem, dtype: torch.dtype = torch.float64, **options: object) -> dict[str, Tensor]:
    """y and every gradient, by moe_mlp in `dtype`."""
    leaf = leaves(p, dtype)
    return sent_back(p, leaf, run(p, leaf, **options))


def sent_back(p: Problem, leaf: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    """y and every gradient, after the upstream one has been sent back through y."""
    y.backward(p.dy_TH.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": leaf[n].grad for n in names(p)}}


def operator_calls(p: Problem, leaf: dict[str, Tensor], **options: Any) -> tuple[list[Any], list[Any]]:
    """Run both passes; return the arguments of the forward operator and, as plain values, of the backward one.

    What calls the operators afterwards is not recorded: torch.library.opcheck runs the backward too, and traces it.
    """
    calls: dict[str, list[Any]] = {}

    def recorded(name: str, op: Any) -> Any:
        def call(*args: Any) -> Any:
            assert name not in calls, f"the {name} operator ran twice"
            calls[name] = list(args)
            return op(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "moe_mlp", recorded("forward", ops.moe_mlp_op))
        patch.setattr(ops, "moe_mlp_backward", recorded("backward", ops.moe_mlp_backward_op))
        run(p, leaf, **options).backward(p.dy_TH.to(leaf["x"].dtype))
    # The backward has no derivative of its own.
    return calls["forward"], [a.detach() if isinstance(a, Tensor) else a for a in calls["backward"]]


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor by name, in relative L2 norm; exactly zero where zero is wanted."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        size = float(value.norm())
        error = float((got[name].double() - value).norm())
        assert error <= tolerance * size, f"{name}: relative error {error / size if size else error:.1e}"


def learned(want: dict[str, Tensor], mask_B: Tensor) -> dict[str, Tensor]:
    """The same with zeros for what slots outside the mask have of their own: weights and biases, or adapters."""
    own = ("dw_", "dbias_", "da_", "db_")
    return {n: restricted(g, mask_B) if n.startswith(own) else g for n, g in want.items()}


def restricted(value: Tensor, mask_B: Tensor) -> Tensor:
    """A stacked gradient with zero rows outside the mask."""
    return value * mask_B.view(-1, *[1] * (value.dim() - 1))
