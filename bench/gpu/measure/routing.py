"""The part `routing`: routing alone, from logits to rows sorted by expert, against torch's own operations.

A row is one router, one contender and one pass. Contenders run in turn in one process on the same logits, of which
three sets rotate, and have been compared before: the same experts but for ties of rounding, rows in order, and weights
alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.measure.launch import MARKS, Times, Turn, in_turn
from bench.gpu.measure.store import Record, Store
from fedmoe_kernels import SlotMap, route

SETS, WARM_UP = 3, 5
TOLERANCE = 1e-5  # of float32 weights; relative, L2
TIES = 1e-4  # share of the places: scores that round alike in one and not in the other change order


@dataclass(frozen=True)
class Router:
    """One router: T tokens, E experts, K choices, and the rule, as `fedmoe_kernels.route` takes it."""

    name: str
    T: int
    E: int
    K: int
    scoring: str = "softmax"
    groups: tuple[int, int] | None = None
    scale: float = 1.0


ROUTERS = (
    Router("qwen3-30b-a3b", 32768, 128, 8),
    Router("deepseek-v3", 8192, 256, 8, "sigmoid", (8, 4), 2.5),
    Router("qwen3-30b-a3b, 1024 tokens", 1024, 128, 8),
)
TINY = (Router("tiny", 96, 8, 2), Router("tiny, sigmoid", 64, 16, 4, "sigmoid", (4, 2), 2.5))


class Sorted(NamedTuple):
    """What routing has to say: weights (T, K), experts (T, K), the place of each row (T * K,), where each begins."""

    weights_TK: Tensor
    experts_TK: Tensor
    places_R: Tensor
    offsets_E1: Tensor


Route = Callable[[Tensor], Sorted]


def by_fedmoe(router: Router, bias_E: Tensor | None, device: str, backend: str) -> Route:
    """Return `fedmoe_kernels.route` with all experts permitted."""
    everyone = SlotMap.build(torch.ones(router.E, dtype=torch.bool)).to(torch.device(device))
    how: dict[str, Any] = {"scoring": router.scoring, "bias_E": bias_E, "groups": router.groups, "scale": router.scale}

    def run(logits_TE: Tensor) -> Sorted:
        made = route(logits_TE, router.K, permitted_E=everyone, backend=backend, **how)
        return Sorted(made.weights_TK, made.experts_TK, made.places_R, made.offsets_B1)

    return run


def by_torch(router: Router, bias_E: Tensor | None) -> Route:
    """Return the same by torch's operations, as a model writes them: scores, topk, a stable sort by expert, offsets."""

    def choose(scores_TE: Tensor) -> Tensor:
        if router.groups is None:
            return scores_TE.topk(router.K, dim=-1).indices
        number, best = router.groups
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
        choice_TGE = choice_TE.view(-1, number, router.E // number)
        group_TG = choice_TGE.topk(2, dim=-1).values.sum(-1).topk(best, dim=-1).indices
        open_TG = torch.zeros_like(choice_TGE[..., 0], dtype=torch.bool).scatter_(1, group_TG, True)
        return choice_TGE.masked_fill(~open_TG[..., None], -torch.inf).flatten(1).topk(router.K, dim=-1).indices

    def run(logits_TE: Tensor) -> Sorted:
        scores_TE = logits_TE.sigmoid() if router.scoring == "sigmoid" else logits_TE.softmax(-1)
        experts_TK = choose(scores_TE.detach())
        weights_TK = scores_TE.gather(1, experts_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * router.scale
        expert_R, places_R = experts_TK.flatten().sort(stable=True)
        ends_E1 = torch.arange(router.E + 1, device=expert_R.device)
        return Sorted(weights_TK, experts_TK, places_R, torch.searchsorted(expert_R, ends_E1))

    return run


def differences(got: Sorted, want: Sorted, E: int) -> list[str]:
    """Name what is wrong: another expert in more than TIES of the places, rows out of order, other weights."""
    same_TK = got.experts_TK == want.experts_TK
    found = [] if float((~same_TK).double().mean()) <= TIES else ["the experts"]
    for name, one in (("fedmoe", got), ("torch", want)):
        expert_R, places_R = one.experts_TK.flatten().sort(stable=True)
        ends_E1 = torch.searchsorted(expert_R, torch.arange(E + 1, device=expert_R.device))
        if not (torch.equal(one.places_R, places_R) and torch.equal(one.offsets_E1, ends_E1)):
            found.append(f"the rows of {name}")
    off = torch.linalg.vector_norm((got.weights_TK - want.weights_TK)[same_TK])
    alike = bool(off <= TOLERANCE * torch.linalg.vector_norm(want.weights_TK))
    return found if alike else [*found, "the weights"]


def measure(router: Router, device: str, backend: str, rounds: int, store: Store) -> bool:
    """Time both contenders, unless the store has them, and say whether they agree; what disagrees is not timed."""
    if store.find("routing", router=router.name):
        return True
    draw = torch.Generator(device).manual_seed(0)
    sets = [torch.randn(router.T, router.E, device=device, generator=draw).requires_grad_() for _ in range(SETS)]
    slopes_TK = torch.randn(router.T, router.K, device=device, generator=draw)
    biased = router.scoring == "sigmoid"
    bias_E = 0.1 * torch.randn(router.E, device=device, generator=draw) if biased else None
    runs = {"fedmoe": by_fedmoe(router, bias_E, device, backend), "torch": by_torch(router, bias_E)}
    with torch.no_grad():
        off = differences(runs["fedmoe"](sets[0]), runs["torch"](sets[0]), router.E)
    if off:
        reason = f"fedmoe and torch disagree in {', '.join(off)}"
        store.add("left_out", [{"peer": "torch's routing", "status": "wrong", "reason": f"{router.name}: {reason}"}])
        return False
    times, host = _times(runs, sets, slopes_TK, device, rounds)
    sizes = [router.T, router.E, router.K]
    rows = []
    for (peer, name), ms in times.items():
        row: Record = {"router": router.name, "sizes": sizes, "scoring": router.scoring, "peer": peer, "pass": name}
        us, host_us = (round(1e3 * statistics.median(found), 2) for found in (ms, host[peer, name]))
        row |= {"us": us, "host us": host_us}
        rows.append(row | {"rounds": rounds})
    store.add("routing", rows)
    return True


def _times(
    runs: dict[str, Route], sets: list[Tensor], slopes_TK: Tensor, device: str, rounds: int
) -> tuple[Times, Times]:
    """Return the device's and the host's milliseconds of the forward and of the backward, contenders in turn."""

    def turn_of(route: Route) -> Turn:
        def run(turn: int, mark: Callable[[], None]) -> None:
            logits_TE = sets[turn % len(sets)]
            mark()
            made = route(logits_TE)
            mark()
            torch.autograd.grad(made.weights_TK, logits_TE, slopes_TK)
            mark()

        return Turn(lambda _: None, run)

    turns = {peer: turn_of(route) for peer, route in runs.items()}
    return in_turn(turns, device, (WARM_UP, rounds), {name: MARKS[name] for name in ("fwd", "bwd")})
