"""The custom ops of routing as torch sees them: gradcheck, opcheck, whole-graph compilation, purity, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedmoe_kernels.routing.ops import place_rows_op, route_backward_op, route_op
from fedmoe_kernels.routing.record import Routing, SlotMap
from fedmoe_kernels.routing.route import route

RULES = [("softmax", True), ("softmax", False), ("topk_softmax", True), ("sigmoid", True), ("sigmoid", False)]
TABLE_CE = torch.tensor([[0, -1, 2, 1, -1, 5], [-1, 3, -1, -1, 4, -1]])
CLIENT_T = torch.tensor([0, 1, 0, 0, 1])
VALID_T = torch.tensor([True, True, False, True, True])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
@pytest.mark.parametrize("permitted", ["all", "some", "fewer than k"])
def test_gradcheck(scoring, renormalize, permitted):
    bits = {"all": [1, 1, 1, 1, 1, 1], "some": [1, 0, 1, 1, 0, 1], "fewer than k": [0, 0, 1, 1, 0, 0]}[permitted]
    slot_map = SlotMap.build(torch.tensor(bits, dtype=torch.bool))

    def weights(logits_TE: Tensor) -> Tensor:
        rule = {"scoring": scoring, "renormalize": renormalize, "scale": 1.7, "valid_T": VALID_T}
        return route(logits_TE, 3, permitted_E=slot_map, **rule).weights_TK

    assert torch.autograd.gradcheck(weights, (draw(5, 6).requires_grad_(),))


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_route(scoring, renormalize, dtype):
    bias_E, groups = (draw(6, seed=1), (3, 2)) if scoring == "sigmoid" else (None, (1, 1))
    logits_TE = draw(5, 6, dtype=dtype).requires_grad_()
    args = (logits_TE, TABLE_CE, CLIENT_T, VALID_T, bias_E, 6, 3, scoring, renormalize, *groups, 1.5, True)
    torch.library.opcheck(route_op, args)


def test_opcheck_route_without_options():
    torch.library.opcheck(
        route_op, (draw(5, 6), torch.arange(6)[None], None, None, None, 6, 2, "softmax", True, 1, 1, 1.0, False)
    )


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
def test_opcheck_route_backward(scoring, renormalize):
    experts_TK = torch.tensor([[0, 2], [4, -1], [-1, -1], [3, 0], [1, 4]])
    args = (draw(5, 2, seed=1), draw(5, 6), experts_TK, TABLE_CE, CLIENT_T, scoring, renormalize, 1.5)
    torch.library.opcheck(route_backward_op, args)


def test_opcheck_place_rows():
    experts_TK = torch.tensor([[0, 2], [4, 7], [1, 1], [3, -1], [1, 4]])
    torch.library.opcheck(place_rows_op, (experts_TK, TABLE_CE, CLIENT_T, VALID_T, 6))


@pytest.mark.parametrize(("scoring", "renormalize"), [*RULES, ("softmax", "share")])
def test_compiles_as_one_graph(scoring, renormalize):
    slot_map = SlotMap.build(torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool))

    def forward(logits_TE: Tensor, valid_T: Tensor) -> Routing:
        rule = {"scoring": scoring, "renormalize": renormalize, "with_stats": True}
        return route(logits_TE, 2, permitted_E=slot_map, valid_T=valid_T, **rule)

    eager_TE, compiled_TE = (draw(5, 6).requires_grad_() for _ in range(2))
    eager = forward(eager_TE, VALID_T)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)(compiled_TE, VALID_T)
    upstream_TK = draw(5, 2, seed=1)
    for routing in (eager, compiled):
        routing.weights_TK.backward(upstream_TK)
    assert torch.equal(compiled.weights_TK, eager.weights_TK)
    assert torch.equal(compiled.rows_TK, eager.rows_TK)
    assert torch.equal(compiled.stats.prob_sum_E, eager.stats.prob_sum_E)
    assert torch.equal(compiled_TE.grad, eager_TE.grad)


def test_compiles_for_any_number_of_tokens_and_without_a_map():
    """One dynamic graph must serve 5, 9 and 3 tokens; from_topk in the same graph."""
    whole = SlotMap.build(torch.ones(6, dtype=torch.bool))
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=counting, fullgraph=True, dynamic=True)
    def forward(logits_TE: Tensor) -> tuple[Routing, Routing]:
        own = route(logits_TE, 2)
        return own, Routing.from_topk(own.experts_TK, own.weights_TK, whole)

    for T in (5, 9, 3):
        own, again = forward(draw(T, 6))
        assert torch.equal(own.rows_TK, again.rows_TK)
        assert torch.equal(own.weights_TK, route(draw(T, 6), 2).weights_TK)
    assert len(graphs) == 1


def test_a_bool_mask_in_compiled_code_is_refused():
    permitted_E = torch.tensor([True, False, True])
    compiled = torch.compile(lambda z: route(z, 1, permitted_E=permitted_E), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"make SlotMap\.build"):
        compiled(draw(2, 3))


def test_inputs_are_not_mutated():
    logits_TE, bias_E, upstream_TK = draw(5, 6).requires_grad_(), draw(6, seed=2), draw(5, 3, seed=1)
    slot_map = SlotMap(TABLE_CE.clone(), 6)
    inputs = [logits_TE, bias_E, upstream_TK, slot_map.slot_of_expert, CLIENT_T, VALID_T]
    before = [value.detach().clone() for value in inputs]
    rule = {"scoring": "sigmoid", "bias_E": bias_E, "groups": (2, 1), "with_stats": True}
    routing = route(logits_TE, 3, permitted_E=slot_map, client_T=CLIENT_T, valid_T=VALID_T, **rule)
    routing.weights_TK.backward(upstream_TK)
    Routing.from_topk(routing.experts_TK, routing.weights_TK, slot_map, client_T=CLIENT_T, valid_T=VALID_T)
    assert all(torch.equal(value, saved) for value, saved in zip(inputs, before, strict=True))


@pytest.mark.parametrize(("scoring", "renormalize"), RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_compute_in_float32(scoring, renormalize, dtype):
    """The same values in float64 give the same choices; weights are float32, the gradient has the logits' dtype."""
    logits_TE, upstream_TK = draw(200, 16, dtype=dtype), draw(200, 4, seed=1)
    grads, rule = [], {"scoring": scoring, "renormalize": renormalize}
    routings = []
    for leaf in (logits_TE.requires_grad_(), logits_TE.detach().double().requires_grad_()):
        routings.append(route(leaf, 4, **rule))
        routings[-1].weights_TK.backward(upstream_TK.to(routings[-1].weights_TK.dtype))
        grads.append(leaf.grad)
    low, high = routings
    assert (low.weights_TK.dtype, high.weights_TK.dtype) == (torch.float32, torch.float64)
    assert (grads[0].dtype, grads[1].dtype) == (dtype, torch.float64)
    assert torch.equal(low.experts_TK, high.experts_TK)
    assert (low.weights_TK - high.weights_TK).norm() < 1e-6 * high.weights_TK.norm()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert (grads[0] - grads[1]).norm() < tolerance * grads[1].norm()


def test_transposed_logits_and_expanded_gradients():
    """A router may hand over a transposed view, and a sum sends back an expanded gradient of stride 0."""
    leaf_ET = draw(6, 5).requires_grad_()
    route(leaf_ET.t(), 2, renormalize=False).weights_TK.sum().backward()
    leaf_TE = leaf_ET.detach().t().contiguous().requires_grad_()
    route(leaf_TE, 2, renormalize=False).weights_TK.backward(torch.ones(5, 2, dtype=torch.float64))
    assert torch.equal(leaf_ET.grad, leaf_TE.grad.t())
    assert leaf_TE.grad.any()
