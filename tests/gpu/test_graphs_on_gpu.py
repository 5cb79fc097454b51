"""CUDA graphs by torch's own means on a layer and on the operators, on a GPU: the same bits as eager steps.

Between the replays the tokens change, and with them how many rows each expert gets. No GPU has run this yet; that
nothing in a step forbids a capture is tested without one (tests/bench/test_capture.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from capture_layers import INNER, LAYERS, E, H, K, T, layer_of
from torch import Tensor

from fedmoe_core import MoE, recording
from fedmoe_kernels import SlotMap, moe_mlp, route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(600),
]
SEEDS = (1, 2, 3)
# Importance sums are the gradient of a leaf that is no parameter of the layer, so no graphed callable returns them.
GRAPHED = [name for name in LAYERS if name != "statistics and importance"]


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, and a gradient of what comes out."""
    draw = torch.Generator("cuda").manual_seed(seed)
    x, dy = (torch.randn(T, H, device="cuda", generator=draw).to(torch.bfloat16) for _ in range(2))
    return x, dy


def step(layer: Callable[[Tensor], Tensor], leaves: list[torch.nn.Parameter], seed: int) -> list[Tensor]:
    """One step from gradients of None: y, dx and every parameter's gradient, copied."""
    x, dy = drawn(seed)
    x.requires_grad_()
    for leaf in leaves:
        leaf.grad = None
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return [value.detach().clone() for value in (y, x.grad, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def made(name: str) -> tuple[MoE, list[torch.nn.Parameter]]:
    layer = layer_of(name, torch.bfloat16).to("cuda")
    return layer, [p for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", GRAPHED)
def test_a_graphed_layer_gives_the_bits_of_the_eager_one(name: str) -> None:
    (eager, eager_leaves), (layer, leaves) = made(name), made(name)
    sample = drawn(0)[0].requires_grad_()
    adapters = layer.lora_scale is not None  # then the experts' own, empty stacks are parameters that nothing reads
    graphed = torch.cuda.make_graphed_callables(layer, (sample,), allow_unused_input=adapters)
    choices = []
    for seed in (*SEEDS, SEEDS[0]):
        with recording(eager) as tape:
            want = step(eager, eager_leaves, seed)
            choices.append(tape.choices(0))
        got = step(graphed, leaves, seed)
        assert len(got) == len(want) >= 2
        assert all(map(torch.equal, got, want)), f"other bits at seed {seed}"
    assert not torch.equal(choices[0], choices[1]), "the routing never changed"


def test_gradients_add_up_over_micro_batches_where_a_hook_copies_them() -> None:
    """Without the hook a parameter's gradient is the graph's own buffer, which the next replay writes over."""
    (eager, eager_leaves), (layer, leaves) = made("plain"), made("plain")
    graphed = torch.cuda.make_graphed_callables(layer, (drawn(0)[0].requires_grad_(),))
    for leaf in leaves:
        leaf.register_hook(torch.clone)
    for seed in SEEDS:
        x, dy = drawn(seed)
        for model in (eager, graphed):
            model(x.clone().requires_grad_()).backward(dy)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, eager_leaves, strict=True))


def test_graphed_route_and_moe_mlp_give_the_bits_of_eager_ones() -> None:
    held, trains = torch.tensor([True] * 6 + [False] * 2), torch.tensor([True] * 3 + [False] * 5)
    slot_map = SlotMap.build(held.cuda(), trains.cuda())
    w_in, w_out = torch.randn(6, 2 * INNER, H) / H**0.5, torch.randn(6, H, INNER) / INNER**0.5
    weights = [w.to("cuda", torch.bfloat16).requires_grad_() for w in (w_in, w_out)]

    def run(logits_TE: Tensor, x_TH: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return moe_mlp(x_TH, route(logits_TE, K, permitted_E=slot_map), w_in, w_out, backend="triton")

    def arguments(seed: int) -> list[Tensor]:
        logits_TE = torch.randn(T, E, device="cuda", generator=torch.Generator("cuda").manual_seed(100 + seed))
        return [logits_TE.requires_grad_(), drawn(seed)[0].requires_grad_(), *weights]

    graphed = torch.cuda.make_graphed_callables(run, tuple(arguments(0)))
    for seed in SEEDS:
        given, dy = arguments(seed), drawn(seed)[1]
        found = []
        for call in (run, graphed):
            y = call(*given)
            found.append([y.clone(), *(grad.clone() for grad in torch.autograd.grad(y, given, dy))])
        want, got = found
        assert all(map(torch.equal, got, want)), f"other bits at seed {seed}"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["plain", "adapters", "4 bits"])
def test_a_layer_compiled_with_reduced_overhead_runs_as_cuda_graphs(name: str) -> None:
    """Inductor may round the router's product otherwise, so results are compared and not their bits."""
    from torch._dynamo.utils import counters

    (eager, eager_leaves), (layer, leaves) = made(name), made(name)
    counters.clear()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for seed in (0, 0, *SEEDS):  # the first calls warm up and capture
        torch.compiler.cudagraph_mark_step_begin()
        got, want = step(compiled, leaves, seed), step(eager, eager_leaves, seed)
        for one, other in zip(got, want, strict=True):
            off = torch.linalg.vector_norm(one.double() - other.double())
            assert off <= 1e-2 * torch.linalg.vector_norm(other.double())
    assert counters["inductor"]["cudagraph_skips"] == 0
