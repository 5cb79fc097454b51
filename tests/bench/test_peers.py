"""The peers that are not installed here, stood in for by plain torch: what each is handed, and what is read back of it.

A stand-in follows the calling convention of its package as published (layouts, order of arguments, dtypes); whether the
package itself runs is for a GPU to show.
"""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module under this name, and its parents."""
    for end in range(1, len(name.split("."))):
        parent = ".".join(name.split(".")[:end])
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def experts(x_RH: Tensor, expert_R: Tensor, w: Tensor) -> Tensor:
    """Rows times the matrix (in, out) of the expert of each."""
    return torch.stack([x @ w[int(e)] for x, e in zip(x_RH, expert_R, strict=True)])


def combined(rows_RH: Tensor, weights_R: Tensor, T: int) -> Tensor:
    return (rows_RH * weights_R.to(rows_RH.dtype)[:, None]).view(T, -1, rows_RH.shape[1]).sum(1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


class LigerFusedMoEFunction:
    """(x, gate_up (E, 2I, H), down (E, H, I), index int32, weights) -> y."""

    @staticmethod
    def apply(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert index.dtype == torch.int32
        rows = x.repeat_interleave(index.shape[1], 0)
        h = swiglu(*experts(rows, index.flatten(), gate_up.transpose(1, 2)).chunk(2, 1))
        return combined(experts(h, index.flatten(), down.transpose(1, 2)), weights.flatten(), x.shape[0])


def flatten_sort_count(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_R, order_R = index.flatten().sort()
    return expert_R, order_R, index.flatten().bincount(minlength=num_experts).cumsum(-1)


def parallel_linear(
    inputs: Tensor,
    weights: Tensor,
    k: int,
    sorted_experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """Weights (E, in, out); rows sorted by expert where `grouped`, else in the order of token and choice."""
    rows = experts(inputs if grouped_in else inputs[order // k], sorted_experts, weights)
    if expert_biases is not None:
        rows = rows + expert_biases[sorted_experts]
    if grouped_out:
        return rows
    rows = torch.empty_like(rows).index_copy(0, order, rows)
    return rows if gates is None else (gates.unsqueeze(1) @ rows.view(*gates.shape, -1)).squeeze(1)


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"
    RELU = "relu"


def moe_general_routing_inputs(
    x: Tensor,
    scores: Tensor,
    tokens: Tensor,
    chosen: Tensor,
    w1: Tensor,
    b1: None,
    w2: Tensor,
    b2: None,
    E: int,
    stream_id: int,
    activation_type: ActivationType,
) -> tuple[Tensor, Tensor]:
    """w1 (2I, H, E) with gate and up row by row, w2 (H, I, E); tokens ascending."""
    assert tokens.dtype == chosen.dtype == torch.int32
    assert bool((tokens.diff() >= 0).all())
    z = experts(x[tokens], chosen, w1.permute(2, 1, 0))
    h = swiglu(z[:, ::2], z[:, 1::2]) if activation_type is ActivationType.SWIGLU else z.relu()
    return combined(experts(h, chosen, w2.permute(2, 1, 0)), scores, x.shape[0]), chosen


class ParallelDroplessMLP(nn.Module):
    """mlp.w1, mlp.v1 and mlp.w2 of (E * I, H): x @ w1.T, x @ v1.T, h @ w2."""

    def __init__(self, args: SimpleNamespace) -> None:
        super().__init__()
        self.args, self.mlp = args, nn.Module()

    def forward(self, x: Tensor, _: None, weights: Tensor, index: Tensor) -> Tensor:
        split = self.args.moe_num_experts, self.args.ffn_hidden_size, self.args.hidden_size
        parts = {name: value.view(split) for name, value in self.mlp.named_parameters()}
        rows, chosen = x.repeat_interleave(index.shape[1], 0), index.flatten()
        h = self.args.activation_fn(experts(rows, chosen, parts["w1"].transpose(1, 2)))
        if self.args.mlp_type == "glu":
            h = h * experts(rows, chosen, parts["v1"].transpose(1, 2))
        return combined(experts(h, chosen, parts["w2"]), weights.flatten(), x.shape[0])


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=LigerFusedMoEFunction)
    linear = {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    install(monkeypatch, "scattermoe.parallel_experts", **linear)
    install(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs)
    install(monkeypatch, "sonicmoe.enums", ActivationType=ActivationType)
    install(monkeypatch, "megablocks.layers.dmoe", ParallelDroplessMLP=ParallelDroplessMLP)
    install(monkeypatch, "megablocks.layers.arguments", Arguments=SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("case", ["all", "eighth-quarter", "none"])
@pytest.mark.parametrize("name", ["liger", "scattermoe", "sonicmoe", "megablocks"])
def test_a_peer_gets_its_own_layout_and_its_gradients_come_back_in_ours(name: str, case: str) -> None:
    from bench.common.cases import CLIENT_CASES, TINY, problem
    from bench.common.peers import errors, step
    from bench.common.peers_optional import OPTIONAL
    from bench.common.truth import truth

    contender, ran = OPTIONAL[name](), []
    for shape in TINY:
        task = problem(shape, next(c for c in CLIENT_CASES if c.name == case))
        if contender.refuses(task) is None:
            ran.append(shape.activation)
            found = errors(step(contender, task)(), truth(task))
            assert max(found.values()) < 1e-6, (shape.name, found)
    every = {"liger": ["swiglu"], "scattermoe": ["swiglu", "swiglu_oai", "relu"]}
    assert ran == every.get(name, ["swiglu", "relu"])


class Ragged(NamedTuple):
    sizes: Tensor
    rows: int


def by_slices(x: Tensor, w: Tensor, ragged: Ragged, gammas: Tensor | None) -> Tensor:
    """Rows in order, as many of each expert as its size says, each times its weight."""
    assert ragged.sizes.dtype == torch.int32
    assert ragged.rows == len(x)
    expert_R = torch.repeat_interleave(torch.arange(len(ragged.sizes)), ragged.sizes)
    out = experts(x, expert_R, w)
    return out if gammas is None else out * gammas[:, None]


def matmul(
    a: Tensor,
    b: Tensor,
    bias: None,
    a_ragged_metadata: Ragged,
    gather_indx: Tensor | None = None,
    scatter_indx: Tensor | None = None,
    gammas: Tensor | None = None,
) -> Tensor:
    """The later interface: plain indices of tokens to gather, of places to scatter to."""
    assert all(index is None or index.dtype == torch.int32 for index in (gather_indx, scatter_indx))
    rows = by_slices(a if gather_indx is None else a[gather_indx.long()], b, a_ragged_metadata, gammas)
    return rows if scatter_indx is None else torch.empty_like(rows).index_copy(0, scatter_indx.long(), rows)


class Indices(NamedTuple):
    src_indx: Tensor
    dst_indx: Tensor


class RoutingData(NamedTuple):
    gate_scal: Tensor
    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: Ragged


def matmul_ogs(
    x: Tensor,
    w: Tensor,
    bias: None,
    routing_data: RoutingData,
    gather_indx: Indices | None = None,
    scatter_indx: Indices | None = None,
    gammas: Tensor | None = None,
) -> Tensor:
    """The earlier one: gathers the token of a place, and sums over a token's places where it scatters."""
    k = routing_data.n_expts_act
    for index in (gather_indx, scatter_indx):
        assert index is None or bool((index.dst_indx[index.src_indx.long()] == torch.arange(len(index[0]))).all())
    rows = x if gather_indx is None else x[gather_indx.src_indx.long() // k]
    rows = by_slices(rows, w, routing_data.expt_data, gammas)
    if scatter_indx is None:
        return rows
    out = rows.new_zeros(len(rows) // k, rows.shape[1])
    return out.index_add(0, scatter_indx.dst_indx.long() // k, rows)[None]


INTERFACES: dict[str, dict[str, dict[str, Any]]] = {
    "later": {"matmul": {"matmul": matmul}, "reduce": {"reduce": lambda x, dim: (x.sum(dim), None)}},
    "earlier": {
        "matmul_ogs": {
            "matmul_ogs": matmul_ogs,
            "RoutingData": RoutingData,
            "GatherIndx": Indices,
            "ScatterIndx": Indices,
        }
    },
}


@pytest.mark.parametrize("interface", INTERFACES)
def test_triton_kernels_runs_forward_by_either_interface(interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.common.cases import CLIENT_CASES, TINY, problem
    from bench.common.peers import errors, step
    from bench.common.peers_optional import OPTIONAL
    from bench.common.truth import truth

    install(monkeypatch, "triton_kernels.tensor", make_ragged_tensor_metadata=Ragged)
    for name, members in INTERFACES[interface].items():
        install(monkeypatch, f"triton_kernels.{name}", **members)
    contender, ran = OPTIONAL["triton_kernels"](), []
    assert not contender.backward
    for shape in TINY:
        task = problem(shape, next(c for c in CLIENT_CASES if c.name == "eighth-quarter"))
        if contender.refuses(task) is None:
            ran.append(shape.activation)
            got = step(contender, task)()
            assert got.keys() == {"y"}
            assert errors(got, {"y": truth(task)["y"]})["y"] < 1e-6
    assert ran == ["swiglu", "relu"]


def test_another_interface_of_triton_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.common.peers_optional import OPTIONAL

    install(monkeypatch, "triton_kernels.tensor", make_ragged_tensor_metadata=Ragged)
    install(monkeypatch, "triton_kernels.matmul", product=None)
    with pytest.raises(ImportError, match=r"triton_kernels\.matmul has no matmul; .*matmul_ogs cannot"):
        OPTIONAL["triton_kernels"]()
    install(monkeypatch, "triton_kernels.tensor")
    install(monkeypatch, "triton_kernels.matmul", matmul=matmul)
    with pytest.raises(ImportError, match=r"has no make_ragged_tensor_metadata; take it from triton 3\.6"):
        OPTIONAL["triton_kernels"]()


def test_a_peer_without_a_backward_is_timed_forward_and_held_against_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the run itself: its rows are of the forward, compared in y, and no ratio is against it."""
    from bench.common.cases import CLIENT_CASES, TINY
    from bench.common.peers import fedmoe, grouped_mm
    from bench.common.peers_optional import OPTIONAL
    from bench.gpu.measure import timing
    from bench.gpu.measure.store import Store

    install(monkeypatch, "triton_kernels.tensor", make_ragged_tensor_metadata=Ragged)
    for name, members in INTERFACES["later"].items():
        install(monkeypatch, f"triton_kernels.{name}", **members)
    about = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit", "kernels", "harness", "tiles"), "none")
    store = Store(about | {"device": "cpu", "rehearsal": True, "date": "2026-01-01"}, tmp_path)
    plan = timing.Plan("cpu", torch.float32, None, 2, 0.01)
    contenders = [fedmoe(), grouped_mm(), OPTIONAL["triton_kernels"]()]
    timing.run_case(TINY[0], CLIENT_CASES[0], contenders, plan, store)
    assert store.data["left_out"] == []
    rows = [row for row in store.data["rows"] if row["peer"] == "triton_kernels"]
    assert {(row["launch"], row["pass"]) for row in rows} == {("eager", "fwd"), ("sustained", "fwd")}
    assert all(row["errors"].keys() == {"y"} for row in rows)
    assert {row["best_peer"] for row in store.data["rows"] if row["pass"] == "fwd"} <= {"grouped_mm", None}


@pytest.mark.parametrize("name", ["liger", "scattermoe", "sonicmoe", "megablocks", "triton_kernels"])
def test_a_peer_that_is_not_installed_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.common.peers_optional import OPTIONAL

    for package in ("liger_kernel", "scattermoe", "sonicmoe", "megablocks", "triton_kernels"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError):
        OPTIONAL[name]()
