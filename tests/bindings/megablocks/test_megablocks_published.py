"""The published megablocks package on our stand-ins, against plain loops in float64 and against our own layer.

It is installed without its dependencies, which pin an old torch: make megablocks.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dmoe_truth import relative, truth
from processes import of_a_child
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import silu

from fedmoe_bindings import megablocks as ours
from fedmoe_bindings.megablocks.backend import INSTALL, missing

if missing() is not None:
    pytest.skip(f"{missing()} is not installed; run `make megablocks`, or: {INSTALL}", allow_module_level=True)

SUPPORT = Path(__file__).parents[2] / "support" / "megablocks"
CHILD = of_a_child()
# Fewer than 128 rows in all its experts together the package does not take.
SMALL = dict(hidden_size=12, ffn_hidden_size=32, moe_num_experts=5, moe_top_k=2, fp16=False, return_bias=False)
SMALL |= dict(mlp_impl="grouped", device="cpu")
SETTINGS = {
    "glu": dict(mlp_type="glu"),
    "mlp": dict(mlp_type="mlp"),
    "silu, no bias, weights that sum to 1": dict(
        mlp_type="glu", bias=False, activation_fn=silu, moe_normalize_expert_weights=1
    ),
    "2-norm": dict(mlp_type="mlp", moe_normalize_expert_weights=2.0),
    "memory optimized glu": dict(mlp_type="glu", memory_optimized_mlp=True),
    "memory optimized mlp": dict(mlp_type="mlp", memory_optimized_mlp=True, activation_fn=silu),
    "memory optimized mlp, default activation": dict(mlp_type="mlp", memory_optimized_mlp=True),
    "one choice": dict(mlp_type="glu", moe_top_k=1),
    "all experts": dict(mlp_type="glu", moe_top_k=5),
    "one expert": dict(mlp_type="mlp", moe_top_k=1, moe_num_experts=1, ffn_hidden_size=128),
    "uniform": dict(mlp_type="mlp", uniform_expert_assignment=True),
    "shared expert": dict(mlp_type="glu", shared_expert=True, shared_expert_hidden_size=8),
    "shared expert, weighted": dict(mlp_type="mlp", shared_expert=True, shared_expert_weighted_sum=True, bias=False),
}
# megablocks' own derivative of the default activation has its constants in 8 digits.
ROUNDED = {"memory optimized mlp, default activation": 1e-7}
named = pytest.mark.parametrize("setting", SETTINGS, ids=str)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """The package, imported once for this file, and gone from the process after it."""
    ours.install_backend()
    import megablocks

    yield megablocks
    ours.uninstall_backend()
    assert "megablocks" not in sys.modules


def pair(theirs: Any, setting: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, ours.dMoE]:
    """Their layer and ours, weights of 0.7 loaded from theirs by the state dict."""
    torch.manual_seed(0)
    published, own = theirs.dMoE(theirs.Arguments(**SMALL | setting)), ours.dMoE(ours.Arguments(**SMALL | setting))
    for parameter in published.to(dtype).parameters():
        nn.init.normal_(parameter, std=0.7)
    own.to(dtype).load_state_dict(published.state_dict())
    return published, own


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return {"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def test_it_is_the_version_that_the_binding_names(theirs: Any) -> None:
    assert importlib.metadata.version("megablocks") == "0.10.0"
    assert importlib.metadata.version("stanford-stk") == "0.7.1"


@named
def test_the_published_layer_runs_on_our_products(theirs: Any, setting: str) -> None:
    layer, x, dy = pair(theirs, SETTINGS[setting])[0], drawn(7, 3, 12), drawn(7, 3, 12, seed=2)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    args = ours.Arguments(**SMALL | SETTINGS[setting])
    leaf = x.clone().requires_grad_()
    y = truth(args, leaves, leaf).out
    grads = torch.autograd.grad(y, [leaf, *leaves.values()], dy, materialize_grads=True)
    want = {"y": y} | dict(zip(("x", *leaves), grads, strict=True))
    got = run(layer, x, dy)
    assert got.keys() == want.keys()
    for name in want:
        assert relative(got[name], want[name]) < ROUNDED.get(setting, 1e-12), name


@named
def test_our_layer_is_the_published_one(theirs: Any, setting: str) -> None:
    published, own = pair(theirs, SETTINGS[setting])
    x, dy = drawn(7, 3, 12), drawn(7, 3, 12, seed=2)
    want, got = run(published, x, dy), run(own, x, dy)
    assert list(got) == list(want), "optimizers number parameters by their order"
    for name in want:
        assert relative(got[name], want[name]) < ROUNDED.get(setting, 1e-12), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_other_dtypes(theirs: Any, dtype: torch.dtype, tolerance: float) -> None:
    published, own = pair(theirs, dict(mlp_type="glu", moe_top_k=5), dtype)
    x, dy = drawn(7, 3, 12).to(dtype), drawn(7, 3, 12, seed=2).to(dtype)
    want, got = run(published, x, dy), run(own, x, dy)
    for name in want:
        assert relative(got[name], want[name].double()) < tolerance, name


@named
def test_state_dicts_and_states_go_both_ways(theirs: Any, setting: str) -> None:
    published, own = pair(theirs, SETTINGS[setting])
    assert list(own.state_dict()) == list(published.state_dict())
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    published.load_state_dict(own.state_dict())
    tensors = {name: tensor.clone() for name, tensor in published.state_dict().items()}
    state = ours.state_of(published)
    rebuilt = ours.to_state_dict(state)
    assert rebuilt.keys() == tensors.keys()
    assert all(torch.equal(rebuilt[name], tensors[name]) for name in tensors)
    copied = ours.to_state_dict(ours.state_of(own))
    for parameter in published.parameters():
        nn.init.zeros_(parameter)
    ours.load_into(published, ours.from_state_dict(copied, ffn_hidden_size=own.router.args.ffn_hidden_size))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in published.state_dict().items())


@pytest.mark.parametrize("mlp_type", ["glu", "mlp"])
def test_fedmoes_own_layer_of_a_published_one(theirs: Any, mlp_type: str) -> None:
    """With its default activation, bias and shared expert, trained a little, and loaded back."""
    published, x = pair(theirs, dict(mlp_type=mlp_type, shared_expert=True))[0], drawn(9, 12)
    layer = ours.moe_of(published)
    assert relative(layer(x), published(x)) < 1e-12
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    ours.load_into(published, ours.weights_of(layer))
    assert relative(layer(x), published(x)) < 1e-12


def test_return_bias_and_jitter(theirs: Any) -> None:
    published, own = pair(theirs, dict(mlp_type="mlp", return_bias=True, moe_jitter_eps=0.3))
    x, found = drawn(5, 2, 12), []
    for layer in (published, own):
        torch.manual_seed(7)
        found.append(layer(x))
    (want, want_bias), (got, bias) = found
    assert relative(got, want) < 1e-12
    assert torch.equal(bias, want_bias)


def test_the_losses(theirs: Any) -> None:
    from megablocks.layers import moe, router

    setting = dict(mlp_type="glu", num_layers=2, moe_loss_weight=0.3, moe_zloss_weight=1e-2, bias=False)
    layers = [pair(theirs, setting) for _ in range(2)]
    published, own = (nn.ModuleList(column) for column in zip(*layers, strict=True))
    args, own_args = theirs.Arguments(**SMALL | setting), ours.Arguments(**SMALL | setting)
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()
    x = drawn(6, 3, 12)
    for model in (published, own):
        model[1](model[0](x))
    want = moe.batched_load_balancing_loss(args), router.batched_router_zloss(args)
    got = ours.batched_load_balancing_loss(own_args, own), ours.batched_router_zloss(own_args, own)
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 1e-12
        grads = [
            torch.autograd.grad(
                loss.sum(), [m[0].router.layer.weight, m[0].experts.mlp.w2], allow_unused=True, retain_graph=True
            )
            for loss, m in ((one, own), (other, published))
        ]
        for ours_, theirs_ in zip(*grads, strict=True):
            assert (ours_ is None) == (theirs_ is None)
            assert ours_ is None or relative(ours_, theirs_) < 1e-12
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()


@pytest.mark.parametrize("capacity", [0, 1], ids=["none is dropped", "what exceeds the mean is dropped"])
def test_the_dropping_layer_runs_too(theirs: Any, capacity: int) -> None:
    args = theirs.Arguments(**SMALL | dict(moe_capacity_factor=capacity, bias=False))
    layer, x = theirs.MoE(args).double(), drawn(7, 3, 12).requires_grad_()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    leaf, dy = x.detach().clone().requires_grad_(), drawn(7, 3, 12, seed=2)
    flat = leaf.view(-1, 12)
    weights, chosen = (flat @ leaves["router.layer.weight"].T).softmax(-1).topk(2, -1)
    room, taken, out = (capacity * 2 * 21 // 5) or 42, [0] * 5, [torch.zeros(12, dtype=x.dtype)] * 21
    for token in range(21):
        for j, e in enumerate(chosen[token].tolist()):
            taken[e] += 1
            if taken[e] <= room:
                h = args.activation_fn(flat[token] @ leaves["experts.mlp.w1"][e])
                out[token] = out[token] + weights[token, j] * (h @ leaves["experts.mlp.w2"][e])
    y = torch.stack(out).view(x.shape)
    assert (max(taken) > room) == bool(capacity), "the case drops something, or nothing"
    grads = torch.autograd.grad(y, [leaf, *leaves.values()], dy)
    want, got = {"y": y} | dict(zip(("x", *leaves), grads, strict=True)), run(layer, x.detach(), dy)
    for name in want:
        assert relative(got[name], want[name]) < 1e-12, name


def test_the_package_s_own_verbs_have_derivatives(theirs: Any) -> None:
    """As megablocks.ops offers them, with its autograd around our copies."""
    from megablocks import ops

    experts = torch.tensor([2, 0, 0, 2, 3, 0, 2, 2], dtype=torch.int32)
    bin_ids, indices = ops.sort(experts, 2)
    counts = ops.histogram(experts, 4)
    bins, padded_bins = ops.inclusive_cumsum(counts, 0), ops.inclusive_cumsum(ops.round_up(counts, 4), 0)
    assert torch.equal(ops.exclusive_cumsum(counts, 0), bins - counts)
    x, w = drawn(4, 3).requires_grad_(), drawn(8, seed=2).requires_grad_()
    rows, padded = drawn(8, 3, seed=3).requires_grad_(), drawn(12, 3, seed=4).requires_grad_()
    boxes = drawn(4, 3, 3, seed=5).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.gather(x, indices, bin_ids, bins, 2), (x,))
    assert check(lambda r, w: ops.scatter(r, indices, bin_ids, w, bins, 2), (rows, w))
    assert check(lambda x: ops.padded_gather(x, indices, bin_ids, bins, padded_bins, 2), (x,))
    assert check(lambda r, w: ops.padded_scatter(r, indices, bin_ids, w, bins, padded_bins, 2), (padded, w))
    assert check(lambda x: ops.binned_gather(x, indices, bins, 3, 2), (x,))
    assert check(lambda b, w: ops.binned_scatter(b, indices, w, bins, 2), (boxes, w))
    assert check(lambda x: ops.replicate(x, torch.tensor([1, 1, 4]), 4), (drawn(2, 3).requires_grad_(),))
    assert ops.topology(padded_bins, 4, 3, 2).tolist() == [0, 1, 4, 5, 6, 7]


def test_the_sparse_layers_are_refused_by_the_package_itself(theirs: Any) -> None:
    with pytest.raises(ValueError, match="Sparse MLP is not supported with triton"):
        theirs.Arguments(**SMALL | dict(mlp_impl="sparse"))


def test_its_expert_parallelism_runs_on_two_ranks(tmp_path: Path) -> None:
    """Every process puts the stand-ins in for itself; the ranks meet in a folder."""
    for said in run_ranks(SUPPORT / "two_ranks.py", tmp_path, env=CHILD, limit=300):
        assert float(said.split()[-1]) < 1e-13


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_our_copies_are_what_its_own_kernels_do() -> None:
    """In Triton's interpreter, in a process of its own: that is settled when triton is imported."""
    command = [sys.executable, str(SUPPORT / "published_copies.py")]
    child = CHILD | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=child, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    count, error = done.stdout.split()
    assert int(count) == 15
    assert float(error) < 1e-6


def test_the_guide_s_part_that_needs_the_package_runs() -> None:
    """Blocks of language `python` are run with the pages; this one is `py`, for there the package may be missing."""
    page = (SUPPORT.parents[2] / "docs" / "guides" / "megablocks.md").read_text("utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], env=CHILD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
