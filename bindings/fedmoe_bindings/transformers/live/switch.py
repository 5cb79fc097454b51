"""Switch Transformers in the simulator: its encoder as a classifier's trunk, its blocks in the words of our layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedmoe_bindings.transformers.stock.blocks import StockBlock
from fedmoe_bindings.transformers.stock.forms import activation_of
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_kernels.backends import warn_once

TOP_K = 1
# Top-1 by softmax, and the chosen expert's output times its probability (arXiv 2101.03961, eq. 1 and 2 [E]).
RULE = RoutingRule("softmax", renormalize=False)


def switch_activation(block: StockBlock) -> str:
    """Return the activation of a Switch block's experts, and say once that our layer has no capacity.

    Raises:
        ValueError: none of ours is the same, or the experts drop values at random.
    """
    experts: Any = block.experts
    first, router = next(iter(experts.values())), block.router
    if first.dropout.p:
        raise ValueError(
            f"the experts of {block.name} drop values at random, which fedmoe's layer does not; set dropout_rate=0 in "
            "the model's configuration, or use use_fedmoe"
        )
    act: Callable[..., Any] = first.act
    found = activation_of(first, act, first.wi.weight)
    if found is None:
        raise ValueError(f"the experts of {block.name} have an activation that fedmoe's layer does not have")
    warn_once(
        f"{type(router).__name__} gives an expert room for {router.expert_capacity} tokens of a sequence and drops the "
        "rest; fedmoe's layers drop none, so a longer sequence may come out differently"
    )
    return found


def switch_tensors(block: StockBlock) -> dict[str, str]:
    """Say where a Switch block keeps each tensor; ``{}`` stands for an expert's number."""
    places = {"w_in": "experts.expert_{}.wi.weight", "w_out": "experts.expert_{}.wo.weight"}
    router: Any = block.router
    bias = {} if router.classifier.bias is None else {"router_bias": "router.classifier.bias"}
    return places | {"router": "router.classifier.weight"} | bias
