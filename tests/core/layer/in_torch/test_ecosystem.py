"""The layer where users put it: a plain loop, torch.compile, checkpointing, autocast, torch.export, torch.func, copies.

Two ranks are in test_distributed.py, state dicts in ../test_saved.py, meta and offloading in test_without_values.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from layer_cases import E, H, K, dense, mask, relative
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp
from torch.utils.checkpoint import checkpoint

from fedmoe_core.layer.moe import MoE
from fedmoe_kernels import SlotMap, moe_mlp, route

KINDS = {"whole": {}, "partial": {"permitted": mask(1, 2, 3, 5), "trainable": mask(1, 3)}}
T = 14
REAL = torch.arange(T) < 11


def made(dtype: torch.dtype = torch.float32, **options: object) -> MoE:
    return MoE.from_dense(*(w.to(dtype) for w in dense()), K, **options)


def tokens(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(layer: nn.Module, run: Callable[..., Tensor], *, autocast: bool = False, mask_T: Tensor | None = None) -> list:
    """Output and every gradient of one forward and backward."""
    layer.zero_grad()
    x = tokens(next(layer.parameters()).dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(x, mask_T)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.5), (torch.optim.AdamW, 0.05)])
def test_a_plain_loop_learns(kind: str, optimizer: type[torch.optim.Optimizer], lr: float) -> None:
    torch.manual_seed(0)
    layer = MoE.from_dense(*(w.float() / 4 for w in dense()), K, **KINDS[kind])
    model = nn.Sequential(nn.Linear(H, H), layer, nn.Linear(H, 3))
    optim, x = optimizer(model.parameters(), lr=lr), torch.randn(64, H)
    labels = x[:, :3].argmax(1)
    losses = []
    for _ in range(60):
        optim.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), labels))
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("kind", "dtype", "autocast"),
    [("whole", torch.float32, False), ("partial", torch.float32, True), ("partial", torch.bfloat16, False)],
)
def test_inductor_compiles_one_graph_that_does_the_same(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    layer = made(dtype, with_scores=True, with_stats=True, **KINDS[kind])
    want = step(layer, layer, autocast=autocast, mask_T=REAL)
    sums = layer.scores.leaf_B7.grad.clone()
    layer.scores.reset()
    found = step(layer, torch.compile(layer, fullgraph=True), autocast=autocast, mask_T=REAL)
    # bfloat16 rounds where inductor has joined the casts around it.
    within = 1e-6 if dtype == torch.float32 and not autocast else 0.02
    assert all(relative(a.float(), b.float()) < within for a, b in zip(found, want, strict=True))
    assert layer.last_stats.tokens == 11
    assert relative(layer.scores.leaf_B7.grad, sums) < within


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_that_changes_a_dict_before_the_experts_compiles() -> None:
    """Generation with a static cache does so; "mapping proxy affected by dictionary mutation" was the answer."""
    slot_map, (_, w_in, w_out) = SlotMap.build(torch.ones(E, dtype=torch.bool)), [w.float() for w in dense()]

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        cache = {}
        cache["seen"] = x.sum()
        return moe_mlp(x, route(logits, K, permitted_E=slot_map), w_in, w_out) + cache["seen"]

    x, logits = tokens(), torch.randn(T, E)
    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(x, logits), forward(x, logits))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["int8", "mxfp4"])
def test_so_does_one_with_experts_in_few_bits(form: str) -> None:
    torch.manual_seed(0)
    layer = MoE(64, 32, 4, 2, trainable=[True] + [False] * 3, frozen_format=form)
    x = torch.randn(9, 64)

    def forward(x: Tensor) -> Tensor:
        cache = {}
        cache["seen"] = x.sum()
        return layer(x) + cache["seen"]

    assert relative(torch.compile(forward, fullgraph=True, backend="aot_eager")(x), forward(x)) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool, autocast: bool) -> None:
    layer = made(with_scores=True, **KINDS["partial"])
    want = step(layer, layer, autocast=autocast, mask_T=REAL)
    once = layer.scores.leaf_B7.grad.clone()
    found = step(layer, lambda x, m: checkpoint(layer, x, m, use_reentrant=reentrant), autocast=autocast, mask_T=REAL)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert torch.equal(layer.scores.leaf_B7.grad, 2 * once)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_as_near_to_the_truth_as_its_dtype(kind: str) -> None:
    layer, exact = made(**KINDS[kind]), made(torch.float64, **KINDS[kind])
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative(y.double(), exact(x.double())) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(layer(x.bfloat16()).double(), exact(x.double())) < 0.03  # a block before it has cast x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["alone", "with None", "with a mask"])
@pytest.mark.parametrize("strict", [False, True])
def test_export(kind: str, call: str, strict: bool) -> None:
    """The bare layer alone ended in an IndexError inside torch, which counts buffers that are None."""
    layer = made(**KINDS[kind])
    given = {"alone": (tokens(),), "with None": (tokens(), None), "with a mask": (tokens(), REAL)}[call]
    again = torch.export.export(layer, given, strict=strict).module()
    other = (tokens(seed=1), *given[1:])
    assert relative(again(*other), layer(*other)) < 1e-6


def test_export_of_any_number_of_tokens() -> None:
    layer = made(**KINDS["partial"])
    count = torch.export.Dim("count", min=2, max=4096)
    again = torch.export.export(layer, (tokens(), REAL), dynamic_shapes=({0: count}, {0: count})).module()
    for size in (2, 5, 33):
        x, real = torch.randn(size, H), torch.arange(size) % 3 > 0
        assert relative(again(x, real), layer(x, real)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_torch_func_are_those_of_backward(kind: str) -> None:
    """It raised, and wanted a setup_context of an autograd.Function that no user has."""
    layer, x = made(torch.float64, **KINDS[kind]), tokens(torch.float64)
    found = grad(lambda p: functional_call(layer, p, (x, REAL)).square().sum())(dict(layer.named_parameters()))
    layer(x, REAL).square().sum().backward()
    assert all(torch.equal(found[name], p.grad) for name, p in layer.named_parameters())
    rows = jacrev(lambda x: layer(x)[0])(x)
    for place in (0, 5):
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(layer(leaf)[0, place], leaf)
        assert relative(rows[place], want) < 1e-12


def test_derivatives_that_do_not_exist_are_refused_and_not_zero() -> None:
    layer, x = made(torch.float64), tokens(torch.float64)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(layer, (x,), (x,))
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda x: grad(lambda x: layer(x).square().sum())(x).sum())(x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_trains_on_its_own(kind: str) -> None:
    layer = made(with_scores=True, with_stats=True, **KINDS[kind])
    want = step(layer, layer)
    twin = copy.deepcopy(layer)
    assert all(torch.equal(a, b) for a, b in zip(step(twin, twin), want, strict=True))
    with torch.no_grad():
        twin.w_in.zero_()
    assert torch.equal(step(layer, layer)[0], want[0])
    assert layer.scores.rows_B.sum() == twin.scores.rows_B.sum() == 4 * T
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    assert torch.equal(average(tokens()), want[0])


@pytest.mark.parametrize("kind", KINDS)
def test_to_moves_and_casts_all_of_it(kind: str) -> None:
    layer, x = made(**KINDS[kind]), tokens()
    want = layer(x)
    assert torch.equal(layer.double().float()(x), want)
    assert layer.to("meta")(x.to("meta")).shape == want.shape
    assert layer.slot_map.slot_of_expert.device.type == "meta"
    assert relative(made(**KINDS[kind]).half()(x.half()).float(), want) < 0.01
