"""The memory meter against allocations of known size, and the ranks' division of work."""

import torch
from torch import nn

from fedmoe_core.memory import mark, resident_bytes, tensor_bytes, trace_memory
from fedmoe_core.ranks import Ranks

CPU = torch.device("cpu")
MIB = 1 << 20


def megabytes(count):
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_inv2_peak_counts_what_lived_at_once():
    def step():
        first = megabytes(3)
        del first
        kept = megabytes(2)
        return kept, megabytes(2)

    (kept, other), trace = trace_memory(step, CPU)
    assert kept.numel() == other.numel() == 2 * MIB
    assert trace.peak == 4 * MIB


def test_inv2_marks_divide_the_step_and_carry_the_level_over():
    def step():
        kept = megabytes(1)
        mark("later", CPU)
        del kept
        return megabytes(3).numel()

    _, trace = trace_memory(step, CPU)
    assert trace.phases == {"start": MIB, "later": 3 * MIB}


def test_tied_weights_and_views_count_once():
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(8, 4))
    model.b = model.a
    model.register_buffer("view", model.a.detach()[:2])
    assert resident_bytes(model) == 8 * 4 * 4
    assert tensor_bytes([model.a, model.a[1:]]) == 8 * 4 * 4


def test_optimizer_state_and_gradients_are_resident():
    layer = nn.Linear(16, 16, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    assert resident_bytes(layer, optimizer) == 4 * 16 * 16 * 4 + 4  # weight, gradient, two moments, step count


def test_ranks_share_every_item_once_longest_first():
    costs = [5.0, 1.0, 4.0, 3.0, 3.0, 2.0]
    shares = [Ranks(rank, 2).mine(range(6), costs) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(6))
    loads = [sum(costs[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= 2.0
    assert all(share == sorted(share) for share in shares)


def test_gather_keeps_floats_bit_for_bit():
    values = [0.1 + 0.2, 1e-310, -0.0, float("inf")]
    (back,) = Ranks().gather(values)
    assert [value.hex() for value in back] == [value.hex() for value in values]
