"""Two clients whose slots lie end to end in one launch, and each of them alone."""

from __future__ import annotations

import torch
from expert_cases import Problem, leaves, problem
from torch import Tensor

from fedmoe_kernels import ExpertScores, ExpertWeights, Routing, SlotMap, moe_mlp

ROWS_PER_SLOT = 5  # the plan's number, by which tiles are chosen alone and together


def assert_clients_keep_their_bits(dtype: torch.dtype) -> None:
    """Two clients of three slots, the second's last one frozen, laid end to end; and each alone with the same plan."""
    T, trainable = (9, 16), (3, 2)
    clients = [problem(t, 16, 12, 3, 2, biases=True, seed=i) for i, t in enumerate(T)]
    one = SlotMap(torch.arange(3), 3, rows_per_slot=ROWS_PER_SLOT)
    alone = [_by_plan(p, n, one, dtype) for p, n in zip(clients, trainable, strict=True)]
    both = SlotMap(torch.tensor([[0, 1, 2], [3, 4, 5]]), 6, rows_per_slot=ROWS_PER_SLOT)
    whole = Problem(
        torch.cat([p.slots_TK for p in clients]),
        {n: torch.cat([p.tensors[n] for p in clients]) for n in clients[0].tensors},
        torch.cat([p.dy_TH for p in clients]),
    )
    together = _by_plan(whole, 5, both, dtype, torch.arange(2).repeat_interleave(torch.tensor(T)))
    for name, value in together.items():
        parts = value.split(T if name in ("y", "x", "s") else 3)
        assert all(torch.equal(part, own[name]) for part, own in zip(parts, alone, strict=True)), name


def _by_plan(
    p: Problem, trainable: int, slot_map: SlotMap, dtype: torch.dtype, client_T: Tensor | None = None
) -> dict[str, Tensor]:
    """y, scores and every gradient; slots from `trainable` on are frozen."""
    leaf, scores = leaves(p, dtype), ExpertScores(slot_map.num_slots)
    stacks = {
        n: ExpertWeights(leaf[n][:trainable], leaf[n][trainable:].detach())
        for n in ("w_in", "w_out", "bias_in", "bias_out")
    }
    routing = Routing.from_topk(p.slots_TK, leaf["s"], slot_map, client_T=client_T)
    assert routing.rows_per_slot == ROWS_PER_SLOT
    y = moe_mlp(leaf["x"], routing, **stacks, scores=scores, backend="triton")
    y.backward(p.dy_TH.to(dtype))
    return {"y": y.detach(), "scores": scores.leaf_B7.grad, **{n: v.grad for n, v in leaf.items()}}
