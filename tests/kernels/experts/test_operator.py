"""The short way to an operator: the same bits as through torch's dispatcher, and never where something watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_cases import leaves, names, problem, run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fedmoe_kernels import ExpertScores, route
from fedmoe_kernels.experts import ops
from fedmoe_kernels.operator import Operator, function_of
from fedmoe_kernels.routing import ops as routing_ops


class Watch(TorchDispatchMode):
    """Collects the names of the operators that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def doubled() -> tuple[Operator, list[str]]:
    """An operator that doubles, and which way its calls went."""
    ways: list[str] = []

    def body(x: Tensor) -> Tensor:
        ways.append("body")
        return 2 * x

    def op(x: Tensor) -> Tensor:
        ways.append("op")
        return 2 * x

    def backward(ctx: Any, needs: list[bool], grad: Tensor) -> tuple[Tensor]:
        assert needs == [True]
        ways.append("backward")
        return (2 * grad,)

    return Operator(op, body, function_of("Doubled", body, lambda ctx, inputs, output: None, backward)), ways


def test_eager_calls_take_the_body_and_autograd_the_function() -> None:
    call, ways = doubled()
    x = torch.ones(3)
    assert call(x).tolist() == [2, 2, 2]
    y = call(nn.Parameter(x))
    assert type(y.grad_fn).__name__ == "DoubledBackward"
    y.sum().backward()
    with torch.no_grad():
        call(x.clone().requires_grad_())
    assert ways == ["body", "body", "backward", "body"]


class Own(Tensor):
    """A class of its own, as FSDP's and DTensor are."""


def watched_calls() -> dict[str, Any]:
    def under(mode: Any) -> Any:
        def called(call: Operator) -> None:
            with mode():
                call(torch.ones(3))

        return called

    return {
        "a dispatch mode": under(Watch),
        "fake tensors": under(FakeTensorMode),
        "the profiler": under(torch.autograd.profiler.profile),
        "no memory": lambda call: call(torch.ones(3, device="meta")),
        "another class": lambda call: call(torch.ones(3).as_subclass(Own)),
        "a transform": lambda call: torch.func.vmap(call)(torch.ones(3)),
        "tracing": lambda call: torch.jit.trace(lambda x: call(x), torch.ones(3), check_trace=False),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", watched_calls().values(), ids=watched_calls().keys())
def test_what_watches_sees_the_operator(how: Any) -> None:
    call, ways = doubled()
    how(call)
    assert set(ways) == {"op"}


def results(p: Any, *, through: str, **options: Any) -> dict[str, Tensor]:
    leaf, scores = leaves(p, torch.float32), ExpertScores(3)
    watch = Watch()
    if through == "operator":
        with watch:
            y = run(p, leaf, scores=scores, **options)
            y.backward(p.dy_TH.float())
        assert {"fedmoe::moe_mlp", "fedmoe::moe_mlp_backward"} <= set(watch.seen)
    else:
        y = run(p, leaf, scores=scores, **options)
        y.backward(p.dy_TH.float())
    return {"y": y.detach(), "scores": scores.leaf_B7.grad, **{n: leaf[n].grad for n in names(p)}}


@pytest.mark.parametrize("options", [{"biases": True}, {"rank": 2}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_both_ways_of_moe_mlp_give_the_same_bits(options: dict, recompute: bool) -> None:
    p = problem(11, 8, 6, 3, 2, **options)
    found = [results(p, through=way, recompute=recompute) for way in ("operator", "function")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("with_stats", [False, True])
def test_both_ways_of_route_give_the_same_bits(with_stats: bool) -> None:
    logits_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for watch in (Watch(), None):
        leaf_TE = logits_TE.clone().requires_grad_()
        if watch is None:
            routed = route(leaf_TE, 2, with_stats=with_stats)
        else:
            with watch:
                routed = route(leaf_TE, 2, with_stats=with_stats)
            assert "fedmoe::route" in watch.seen
        routed.weights_TK.square().sum().backward()
        found.append((routed.weights_TK.detach(), routed.experts_TK, routed.rows_TK, leaf_TE.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_route_whose_weights_nothing_reads_has_no_gradient_to_send() -> None:
    logits_TE = torch.randn(9, 6, requires_grad=True)
    routed = route(logits_TE, 2)
    assert not routed.experts_TK.requires_grad
    (routed.weights_TK.detach().sum() + logits_TE.sum()).backward()
    assert torch.equal(logits_TE.grad, torch.ones(9, 6))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_goes_the_short_way_too(reentrant: bool) -> None:
    p = problem(11, 8, 6, 3, 2, biases=True)
    want = results(p, through="function")
    leaf = leaves(p, torch.float32)
    y = checkpoint(lambda x: run(p, leaf | {"x": x}), leaf["x"], use_reentrant=reentrant)
    y.backward(p.dy_TH.float())
    assert all(torch.equal(leaf[name].grad, want[name]) for name in names(p))


def test_the_names_are_the_operators() -> None:
    """What compiled and profiled code calls is what is registered with torch."""
    assert ops.moe_mlp.op is ops.moe_mlp_op
    assert routing_ops.route.op is routing_ops.route_op
    with torch.profiler.profile() as profile:
        p = problem(5, 8, 6, 3, 2)
        run(p, leaves(p)).backward(p.dy_TH)
    seen = {event.key for event in profile.key_averages()}
    assert {"fedmoe::moe_mlp", "fedmoe::moe_mlp_backward", "fedmoe::place_rows"} <= seen
