"""The contender fedmoe-graphed: torch's own graphed callable of fedmoe's step, as a training loop would replay it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.common.cases import GRAPHED_TOKENS, Problem, redrawn
from bench.common.peers import Bound, Contender, fedmoe, leaf

CAPTURED = 99  # the seed of the tokens that the graph is captured on


def graphed(backend: str = "auto") -> Contender:
    """Run fedmoe's forward and backward as two CUDA graphs, made by `torch.cuda.make_graphed_callables`.

    What is timed is what a user gets: the tokens, their weights and their choices are copied to where the graph reads
    them, and its results lie in its own memory.
    """

    def bind(task: Problem) -> Bound:
        inner = fedmoe(backend).bind(task)
        leaves = tuple(inner.leaves.values())

        def run(x_TH: Tensor, s_TK: Tensor, experts_TK: Tensor, *_: Tensor) -> Tensor:
            return inner.forward(replace(task, experts_TK=experts_TK), x_TH, s_TK)

        # Captured on other tokens than those that are compared and timed, which go elsewhere. The weights are arguments
        # as well, because only arguments get gradients; they are at the same place in every call, so nothing copies
        # them.
        other = redrawn(task, CAPTURED)
        sample = (leaf(other.x_TH), leaf(other.weights_TK), other.experts_TK.clone(), *leaves)
        replayed = torch.cuda.make_graphed_callables(run, sample)

        def forward(task: Problem, x_TH: Tensor, s_TK: Tensor) -> Tensor:
            return replayed(x_TH, s_TK, task.experts_TK, *leaves)

        return inner._replace(forward=forward)

    def refuses(task: Problem) -> str | None:
        if task.shape.T > GRAPHED_TOKENS:
            return f"is for up to {GRAPHED_TOKENS} tokens, above which the host is not what a step waits for"
        return None

    detail = f"torch.cuda.make_graphed_callables of fedmoe_kernels.moe_mlp, backend {backend!r}"
    return Contender("fedmoe-graphed", detail, bind, refuses, stores_all=False, risky=True, graphed=True)
