"""What each body of moe_mlp is held to in the same words: the slot loops in float64, the kernels in float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from expert_cases import FACTORS, assert_close, learned, leaves, problem, run, sent_back, solve, truth
from torch.utils.checkpoint import checkpoint

from fedmoe_kernels import ExpertLora, ExpertScores, moe_mlp


def adapters_on_some_slots_with_a_scale_each(dtype: torch.dtype, backend: str, tolerance: float) -> None:
    """Slots from Bl on run their base alone: as if their adapters were zero."""
    p = problem(24, 16, 12, 5, 2, rank=2).rounded(dtype)
    leaf, scale_B = leaves(p, dtype), torch.tensor([0.5, 2.0, -1.0])
    some = ExpertLora(*(leaf[n][:3] for n in FACTORS), scale_B)
    y = moe_mlp(leaf["x"], p.routing(leaf["s"]), leaf["w_in"], leaf["w_out"], lora=some, backend=backend)
    padded = torch.cat([scale_B, torch.zeros(2)]).view(5, 1, 1)
    want = truth(replace(p, lora_scale=1.0, tensors=p.tensors | {n: p.tensors[n] * padded for n in ("b_in", "b_out")}))
    want = want | {n: want[n] * padded for n in ("db_in", "db_out")}
    assert_close(sent_back(p, leaf, y), learned(want, torch.arange(5) < 3), tolerance)


def compiled_whole_has_the_same_bits(options: dict, dtype: torch.dtype, backend: str) -> None:
    p = problem(11, 8, 6, 3, 2, **options)
    scores, plain = ExpertScores(3), ExpertScores(3)
    want = solve(p, dtype, scores=plain, backend=backend)
    leaf, slot_map = leaves(p, dtype), p.slot_map
    compiled = torch.compile(
        lambda values: run(p, values, scores=scores, slot_map=slot_map, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    _same(sent_back(p, leaf, compiled(leaf)), want, scores, plain)


def gradient_checkpointing_counts_scores_once(reentrant: bool, dtype: torch.dtype, backend: str) -> None:
    p = problem(11, 8, 6, 3, 2)
    once, again = ExpertScores(3), ExpertScores(3)
    want = solve(p, dtype, scores=once, backend=backend)
    leaf = leaves(p, dtype)
    y = checkpoint(lambda x: run(p, leaf | {"x": x}, scores=again, backend=backend), leaf["x"], use_reentrant=reentrant)
    _same(sent_back(p, leaf, y), want, again, once)


def _same(got: dict, want: dict, scores: ExpertScores, plain: ExpertScores) -> None:
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert torch.equal(scores.leaf_B7.grad, plain.leaf_B7.grad)


def a_token_of_nan_stays_in_its_own_experts(**options: object) -> None:
    """Neighbours in a tile must not catch it: other tokens' rows and other slots' weight gradients stay finite."""
    p = problem(37, 16, 12, 4, 1)
    p.tensors["x"][5] = float("nan")
    slot_hit = int(p.slots_TK[5, 0])
    got = solve(p, torch.float32, **options)
    others = torch.arange(37) != 5
    assert got["y"][others].isfinite().all()
    assert got["dx"][others].isfinite().all()
    for name in ("dw_in", "dw_out"):
        clean = got[name].flatten(1).isfinite().all(1)
        assert clean.tolist() == [b != slot_hit for b in range(4)]
