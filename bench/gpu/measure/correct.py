"""The part `correct`, what comes out: y, all gradients, scores, adapters, quantised storage, routing against float64.

A check is a name and a function that returns what it found or raises AssertionError; behave.py has the checks of
how it is done (reruns, cohorts, graphs, no waiting for the device).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bench.common.cases import STANDARD, TINY, Case, Problem, Shape, problem
from bench.common.peers import errors, fedmoe, leaf, step
from bench.common.truth import check_truth, truth
from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, Routing, SlotMap, moe_mlp, reference, route
from fedmoe_kernels.activations import ACTIVATIONS
from fedmoe_kernels.formats import FORMATS
from fedmoe_kernels.quantized import Quantized

Check = Callable[[], str]
# Of relative L2 norms: y and gradients; the importance sums, whose signed terms cancel.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-5}
SCORES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
ALL, QUARTER, NONE = Case("all"), Case("quarter", trainable=0.25), Case("none", trainable=0.0)
EIGHTH = Case("eighth", permitted=1 / 8)


def shapes(*, tiny: bool) -> dict[str, tuple[Shape, Case]]:
    """List problems and what each is for; the tiny ones are for a rehearsal on a CPU."""

    def shape(name: str, *sizes: int, activation: str = "swiglu", bias: bool = False) -> Shape:
        T, H, inner, E, K = sizes
        if tiny:
            T, H, inner = min(T, 40 + T % 8), min(H, 32 + H % 8), min(inner, 24 + inner % 8)
        return Shape(name, T, H, inner, E, K, activation, bias)

    # Few (H, I): the kernels are compiled again for each.
    medium, few = (2048, 512, 256, 16, 4), (512, 512, 256, 8, 2)
    found = {
        "many rows a slot": (shape("medium", *medium), ALL),
        "a quarter trainable": (shape("medium", *medium), QUARTER),
        "none trainable": (shape("medium", *medium), NONE),
        "an eighth permitted": (shape("medium", *medium), EIGHTH),
        "few rows a slot": (shape("sparse", 64, 512, 256, 64, 4), QUARTER),
        "no size a multiple of a block": (shape("odd", 1003, 520, 328, 7, 3), ALL),
        "rows that no descriptor can address": (shape("unaligned", 301, 100, 52, 8, 2, bias=True), QUARTER),
        "odd sizes": (shape("prime", 257, 67, 33, 5, 2), ALL),
        "one choice a token": (shape("k1", 512, 512, 256, 8, 1), ALL),
        "one token": (shape("t1", 1, 512, 256, 8, 2), ALL),
        "no token": (shape("t0", 0, 512, 256, 8, 2), ALL),
        "k = 16": (shape("k16", 256, 512, 256, 32, 16), ALL),
        "one slot has all rows": (shape("one", 700, 512, 256, 8, 1), replace(ALL, routes="one")),
        "places without a row": (shape("gaps", *few), replace(ALL, routes="gaps")),
        "no row at all": (shape("nowhere", *few), replace(ALL, routes="nowhere")),
        "empty slots": (shape("empty", *few), replace(ALL, routes="empty")),
        "skewed": (shape("zipf", *few), replace(QUARTER, routes="zipf")),
    }
    for activation in ACTIVATIONS:
        found[f"{activation} with biases"] = (shape(activation, *few, activation=activation, bias=True), QUARTER)
    return found


def full_shapes(*, tiny: bool) -> list[tuple[Shape, Case]]:
    """List the layers that are timed, each with few tokens, and the first as it is timed with an eighth permitted."""
    offered = TINY if tiny else STANDARD
    small = Case("1024 tokens, an eighth permitted, a quarter trainable", 1 / 8, 0.25, tokens=1024)
    whole = replace(small, name="an eighth permitted, a quarter trainable", tokens=None)
    return [*((shape, small) for shape in offered), (offered[0], whole)]


def checks(device: str, backend: str, *, tiny: bool) -> Mapping[str, Check]:
    """List all checks of this file by name, in the order to run them."""
    found: dict[str, Check] = {"the float64 truth is the reference": lambda: _truth_is_reference(device)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        for name, (shape, case) in shapes(tiny=tiny).items():
            found[f"{short}: {name}"] = _bind(_experts, shape, case, device, backend, dtype)
        found[f"{short}: importance sums"] = _bind(_scores, device, backend, dtype)
        found[f"{short}: adapters over shared bases"] = _bind(_lora, device, backend, dtype)
        # In bfloat16 every format, and two that are decoded before their products; elsewhere one of 8 bits, one of 4.
        forms = tuple(FORMATS) if dtype == torch.bfloat16 else ("int8", "mxfp4")
        for form in forms:
            found[f"{short}: frozen experts as {form}"] = _bind(_quantized, form, None, device, backend, dtype)
        for form in forms[-2:]:
            how = (form, 4096, device, backend, dtype)
            found[f"{short}: frozen experts as {form}, decoded first"] = _bind(_quantized, *how)
    for shape, case in full_shapes(tiny=tiny):
        found[f"bfloat16: {shape.name}, {case.name}"] = _bind(_experts, shape, case, device, backend, torch.bfloat16)
    for name, rule in _RULES.items():
        found[f"route: {name}"] = _bind(_route, rule, device, backend, tiny)
    return MappingProxyType(found)


def matters_first(name: str) -> bool:
    """Tell whether a check is of what training uses: bfloat16, and routing; the rest comes after it."""
    return not name.startswith(("float16", "float32", "torch.compile"))


def in_order(found: Mapping[str, Check]) -> Mapping[str, Check]:
    """Sort checks: of what training uses those of how it is done first, for a race or a wait makes all else void."""

    def place(name: str) -> tuple[bool, bool]:
        deeds = ("a CUDA graph", "nothing waits", "bitwise", "clients of a cohort", "z made again", "float64 truth")
        return not matters_first(name), not any(deed in name for deed in deeds)

    return MappingProxyType({name: found[name] for name in sorted(found, key=place)})


def _bind(run: Callable[..., str], *args: Any) -> Check:
    return lambda: run(*args)


def hold(found: Mapping[str, float], tolerance: float) -> str:
    """Return the worst error in words; AssertionError names every tensor that is off."""
    off = {name: error for name, error in found.items() if not error < tolerance}
    assert not off, ", ".join(f"{name} is off by {error:.1e}" for name, error in off.items()) + f" ({tolerance:.0e})"
    return f"worst relative error {max(found.values(), default=0.0):.1e} of {', '.join(found)}"


def poison(device: str) -> None:
    """Fill the caching allocator's free blocks with NaN, so that an output that a kernel forgets is loud."""
    if device == "cuda":
        blocks = [torch.full((size,), float("nan"), device=device) for size in (2**16, 2**20, 2**24, 2**26, 2**26)]
        del blocks


def _truth_is_reference(device: str) -> str:
    worst: dict[str, float] = {}
    for activation in ACTIVATIONS:
        for case in (QUARTER, replace(ALL, routes="gaps")):
            task = problem(Shape("small", 11, 12, 8, 5, 2, activation, bias=True), case, device=device)
            for name, error in check_truth(task).items():
                worst[name] = max(error, worst.get(name, 0.0))
    return hold(worst, 1e-12)


def _experts(shape: Shape, case: Case, device: str, backend: str, dtype: torch.dtype) -> str:
    task = problem(shape, case, device=device, dtype=dtype)
    want = truth(task, keep=torch.float64)
    poison(device)
    return hold(errors(step(fedmoe(backend), task)(), want), TOLERANCE[dtype])


def small(dtype: torch.dtype, device: str) -> Problem:
    """Draw a problem that `reference.py` takes a fraction of a second for."""
    return problem(Shape("small", 24, 64, 32, 6, 2, bias=True), Case("half", trainable=0.5), device=device, dtype=dtype)


def _scores(device: str, backend: str, dtype: torch.dtype) -> str:
    task = small(dtype, device)
    slot_map = SlotMap.build(task.permitted_E, task.trainable_E)
    stacks = {n: stored(full[slot_map.expert_of_slot_B], task.trainable_E) for n, full in task.stacks.items()}
    scores, s_TK = ExpertScores(slot_map.num_slots, device=device), leaf(task.weights_TK)
    routing = Routing.from_topk(task.experts_TK, s_TK, slot_map, backend=backend)
    poison(device)
    y_TH = moe_mlp(leaf(task.x_TH), routing, scores=scores, backend=backend, **stacks)
    y_TH.backward(task.dy_TH)
    want = reference.importance(
        *(t.cpu().double() for t in (task.dy_TH, task.x_TH)),
        routing.slots_TK.cpu(),
        s_TK.detach().cpu().double(),
        **{n: full.cpu().double()[slot_map.expert_of_slot_B.cpu()] for n, full in task.stacks.items()},
        trainable_B=torch.arange(slot_map.num_slots) < int(task.trainable_E.sum()),
    )
    return hold(errors({name: getattr(scores, name).cpu() for name in want}, want), SCORES[dtype])


def stored(full: Tensor, trainable_E: Tensor) -> ExpertWeights:
    """Lay a stack out in slot order, its trainable part a leaf."""
    count = int(trainable_E.sum())
    return ExpertWeights(leaf(full[:count]), full[count:].clone())


def _lora(device: str, backend: str, dtype: torch.dtype) -> str:
    """Check six slots over three base experts, the last slot without an adapter."""
    task, rank, count = small(dtype, device), 4, 5
    shape, draw = task.shape, torch.Generator(device).manual_seed(3)
    sizes = ((rank, shape.H), (shape.F, rank), (rank, shape.I), (shape.H, rank))  # of a_in, b_in, a_out, b_out
    drawn = (torch.randn(count, *size, generator=draw, device=device) / size[-1] ** 0.5 for size in sizes)
    factors = [factor.to(dtype) for factor in drawn]
    poison(device)
    got = _adapted(task, factors, device, dtype, backend)
    want = _adapted(task, factors, "cpu", torch.float64, "reference")
    return hold(errors({name: value.cpu() for name, value in got.items()}, want), TOLERANCE[dtype])


def _adapted(task: Problem, factors: list[Tensor], where: str, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    leaves = [leaf(factor.to(where, dtype)) for factor in factors]
    x_TH = leaf(task.x_TH.to(where, dtype))
    s_TK = leaf(task.weights_TK.to(where, torch.promote_types(dtype, torch.float32)))
    routing = Routing.from_topk(task.experts_TK.to(where), s_TK, SlotMap.build(task.permitted_E.to(where)))
    y_TH = moe_mlp(
        x_TH,
        routing,
        **{name: full[:3].to(where, dtype) for name, full in task.stacks.items()},
        lora=ExpertLora(*leaves, 0.7, torch.tensor([2, 0, 1, 1, 0, 2], device=where)),
        backend=backend,
    )
    y_TH.backward(task.dy_TH.to(where, dtype))
    grads = {"dx": x_TH, "ds": s_TK} | dict(zip(("da_in", "db_in", "da_out", "db_out"), leaves, strict=True))
    return {"y": y_TH.detach()} | {name: value.grad for name, value in grads.items() if value.grad is not None}


def _quantized(form: str, rows_per_slot: int | None, device: str, backend: str, dtype: torch.dtype) -> str:
    """Check frozen experts as codes against the same problem with what the codes stand for.

    With `rows_per_slot` the kernels act as in a call of so many, and decode the codes before their products.
    """
    task = problem(Shape("codes", 96, 128, 64, 8, 2), QUARTER, device=device, dtype=dtype)
    slot_map = SlotMap.build(task.permitted_E, task.trainable_E)
    order, count = slot_map.expert_of_slot_B, int(task.trainable_E.sum())
    held, meant = {}, {}
    for name, full in task.stacks.items():
        codes = Quantized.of(full[order[count:]], form)
        held[name] = ExpertWeights(leaf(full[order[:count]]), codes)
        meant[name] = full.index_copy(0, order[count:], codes.dequantize(dtype))
    want = truth(replace(task, stacks=meant), keep=torch.float64)
    x_TH, s_TK = leaf(task.x_TH), leaf(task.weights_TK)
    poison(device)
    routing = Routing.from_topk(task.experts_TK, s_TK, slot_map, backend=backend)
    routing = replace(routing, rows_per_slot=rows_per_slot or routing.rows_per_slot)
    y_TH = moe_mlp(x_TH, routing, backend=backend, **held)
    y_TH.backward(task.dy_TH)
    got = {"y": y_TH.detach(), "dx": x_TH.grad, "ds": s_TK.grad}
    return hold(errors(got | {f"d{n}": value.trainable.grad for n, value in held.items()}, want), TOLERANCE[dtype])


_RULES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "softmax": {},
        "softmax, not renormalised, scaled": {"renormalize": False, "scale": 2.5},
        "topk_softmax": {"scoring": "topk_softmax"},
        "sigmoid with bias and groups": {"scoring": "sigmoid", "bias": True, "groups": (4, 2)},
        "a quarter permitted, padding, statistics": {"permitted": 0.25, "valid": True, "with_stats": True},
        "fewer permitted than k": {"permitted": 0.05},
        "a cohort": {"clients": 3, "permitted": 0.4, "with_stats": True},
        "NaN and infinite logits": {"odd": True},
    }
)


def _route(rule: Mapping[str, Any], device: str, backend: str, tiny: bool) -> str:
    """Route here and by the CPU's path; logits on a grid, so that ties are ties and nothing else is near one."""
    T, E, k = (97, 32, 4) if tiny else (4099, 64, 8)
    draw = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(T, E, generator=draw).mul(64).round().div(64)
    if rule.get("odd"):
        kind_TE = torch.randint(0, 12, (T, E), generator=draw)
        for kind, value in ((0, float("nan")), (1, float("inf")), (2, -float("inf"))):
            logits_TE = logits_TE.masked_fill(kind_TE == kind, value)
    options: dict[str, Any] = {n: rule[n] for n in ("renormalize", "scale", "scoring", "groups") if n in rule}
    options["with_stats"] = rule.get("with_stats", False)
    C = rule.get("clients", 1)
    permitted_CE = torch.rand(C, E, generator=draw) < rule.get("permitted", 2.0)
    permitted_CE[:, 3] = True
    tensors = {"bias_E": torch.randn(E, generator=draw) / 8} if rule.get("bias") else {}
    if rule.get("valid"):
        tensors["valid_T"] = torch.rand(T, generator=draw) < 0.8
    if C > 1:
        tensors["client_T"] = torch.randint(0, C, (T,), generator=draw)
    slot_map = SlotMap.build(permitted_CE if C > 1 else permitted_CE[0])
    grad_TK = torch.randn(T, k, generator=draw)
    poison(device)
    (got, got_grad), (want, want_grad) = (
        _routed(logits_TE, k, slot_map, grad_TK, where, tensors, options | {"backend": how})
        for where, how in ((device, backend), ("cpu", "torch"))
    )
    same = float((got["experts_TK"].cpu() == want["experts_TK"]).all(1).float().mean())
    # Two sigmoids plus two biases can come so near that a rounding decides; on a grid nothing else can.
    assert same >= (0.999 if "bias_E" in tensors else 1.0), f"{1 - same:.2%} of the tokens chose otherwise"
    if same == 1.0:
        for name in ("slots_TK", "rows_TK", "tokens_R", "places_R", "offsets_B1"):
            assert torch.equal(got[name].cpu(), want[name]), f"{name} differs"
    found = {"weights": got["weights_TK"].cpu(), "dlogits": got_grad.cpu()}
    wanted = {"weights": want["weights_TK"], "dlogits": want_grad}
    if options["with_stats"]:
        for name in ("tokens", "hits_E", "prob_sum_E", "prob_max_E", "plogp_sum_E", "lost_mass"):
            found[name], wanted[name] = getattr(got["stats"], name).cpu(), getattr(want["stats"], name)
    return f"{same:.2%} of the choices alike, " + hold(errors(found, wanted), 1e-5 if same == 1.0 else 0.05)


def _routed(
    logits_TE: Tensor,
    k: int,
    slot_map: SlotMap,
    grad_TK: Tensor,
    where: str,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
) -> tuple[dict[str, Any], Tensor]:
    leaf_TE = leaf(logits_TE.to(where))
    moved = {name: value.to(where) for name, value in tensors.items()}
    routing = route(leaf_TE, k, permitted_E=slot_map.to(where), **moved, **options)
    routing.weights_TK.backward(grad_TK.to(where))
    assert leaf_TE.grad is not None
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in vars(routing).items()}, (
        leaf_TE.grad
    )
