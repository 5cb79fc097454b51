"""Graph replay by torch's own `make_graphed_callables`, played on a CPU: other tokens and routing, the eager bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from capture_layers import E, K, layer_of
from replayed import graphs_on_the_cpu
from torch import Tensor

from fedmoe_core import MoE, recording
from fedmoe_kernels import SlotMap, moe_mlp, route

T, H, INNER = 6, 32, 32
SEEDS = (1, 2)
# The rest differ from these inside of a kernel only.
NAMES = ("plain", "none trains", "statistics and importance", "recomputed", "4 bits", "adapters", "an output scale")
ONCE = {"num_warmup_iters": 1}  # the interpreter has nothing to warm up


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(T, H, generator=draw) for _ in range(2))
    return x.requires_grad_(), dy


def made(name: str, backend: str = "triton") -> MoE:
    layer = layer_of(name, torch.float32, sizes=(H, INNER))
    layer.backend = backend
    return layer


def step(layer: Callable[[Tensor], Tensor], leaves: list[Tensor], seed: int) -> list[Tensor]:
    x, dy = drawn(seed)
    for leaf in leaves:
        leaf.grad = None
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return [value.detach().clone() for value in (y, x.grad, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def leaves_of(layer: MoE) -> list[Tensor]:
    return [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", NAMES)
def test_a_graphed_layer_gives_the_bits_of_the_eager_one(name: str) -> None:
    eager, layer = made(name), made(name)
    choices = []
    with graphs_on_the_cpu(), recording(eager) as tape:
        graphed = torch.cuda.make_graphed_callables(
            layer, (drawn(0)[0],), allow_unused_input=layer.lora_scale is not None, **ONCE
        )
        for seed in SEEDS:
            want, got = step(eager, leaves_of(eager), seed), step(graphed, leaves_of(layer), seed)
            choices.append(tape.choices(0))
            assert len(got) == len(want) >= 2
            assert all(map(torch.equal, got, want)), f"other bits at seed {seed}"
            if layer.with_stats:
                assert torch.equal(layer.last_stats.hits_E, eager.last_stats.hits_E)
    assert not torch.equal(choices[0], choices[1]), "the routing never changed"


def test_importance_sums_are_not_made_by_a_graphed_layer() -> None:
    """The guide says so: the leaf that they are the gradient of is neither an argument nor a parameter."""
    layer = made("statistics and importance")
    with graphs_on_the_cpu():
        graphed = torch.cuda.make_graphed_callables(layer, (drawn(0)[0],), **ONCE)
        step(graphed, leaves_of(layer), 1)
    assert layer.scores.rows_B.sum() == 0


@pytest.mark.parametrize("hook", [True, False])
def test_gradients_add_up_over_micro_batches_where_a_hook_copies_them(hook: bool) -> None:
    """Without the hook a parameter's gradient is the graph's own buffer, which the next replay writes over."""
    eager, layer = made("plain"), made("plain")
    with graphs_on_the_cpu():
        graphed = torch.cuda.make_graphed_callables(layer, (drawn(0)[0],), **ONCE)
        if hook:
            for leaf in leaves_of(layer):
                leaf.register_hook(torch.clone)
        for seed in (1, 2):
            x, dy = drawn(seed)
            eager(x).backward(dy)
            graphed(x).backward(dy)
    same = [torch.equal(a.grad, b.grad) for a, b in zip(leaves_of(layer), leaves_of(eager), strict=True)]
    assert same == [hook] * len(same)


def test_graphed_route_and_moe_mlp_give_the_bits_of_eager_ones() -> None:
    slot_map = SlotMap.build(torch.tensor([True] * 6 + [False] * 2), torch.tensor([True] * 3 + [False] * 5))
    weights = [torch.randn(size).requires_grad_() for size in ((6, 2 * INNER, H), (6, H, INNER))]

    def run(logits_TE: Tensor, x_TH: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        routing = route(logits_TE, K, permitted_E=slot_map, backend="triton")
        return moe_mlp(x_TH, routing, w_in, w_out, backend="triton")

    def arguments(seed: int) -> list[Tensor]:
        logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(100 + seed))
        return [logits_TE.requires_grad_(), drawn(seed)[0], *weights]

    with graphs_on_the_cpu():
        graphed = torch.cuda.make_graphed_callables(run, tuple(arguments(0)), **ONCE)
        for seed in SEEDS:
            given, dy, found = arguments(seed), drawn(seed)[1], []
            for call in (run, graphed):
                y = call(*given)
                found.append([y.clone(), *(grad.clone() for grad in torch.autograd.grad(y, given, dy))])
            assert all(map(torch.equal, *found)), f"other bits at seed {seed}"


def test_the_benchs_graphed_contender_replays_what_it_was_not_captured_on() -> None:
    from bench.common.cases import Case, Shape, problem
    from bench.common.peers import fedmoe
    from bench.common.peers import step as step_of
    from bench.common.peers_graphed import graphed

    task = problem(Shape("small", T, H, INNER, E, K), Case("half", permitted=0.75, trainable=0.5))
    want = step_of(fedmoe("triton"), task)()
    with graphs_on_the_cpu():
        got = step_of(graphed("triton"), task)()
    assert got.keys() == want.keys() == {"y", "dx", "ds", "dw_in", "dw_out"}
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_step_that_reads_a_number_on_the_host_gives_other_bits() -> None:
    """What the tests above would see: the slot loops read how many rows each slot has, and a graph keeps the first."""
    eager, layer = made("plain", "cpu"), made("plain", "cpu")
    with graphs_on_the_cpu():
        graphed = torch.cuda.make_graphed_callables(layer, (drawn(0)[0],), **ONCE)
        assert not torch.equal(step(graphed, leaves_of(layer), 1)[0], step(eager, leaves_of(eager), 1)[0])
