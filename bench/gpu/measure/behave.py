"""The part `correct`, how it is done: bitwise reruns, clients alone and in a cohort, CUDA graphs, no waiting.

A check that needs a GPU raises `Skipped` without one, and is reported so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common.cases import STANDARD, TINY, Case, Problem, Shape, problem
from bench.common.peers import Outcome, errors, fedmoe, leaf, step
from bench.common.truth import truth
from bench.gpu.measure import correct
from bench.gpu.measure.correct import Check, hold, poison, small, stored
from bench.gpu.measure.launch import capture
from fedmoe_kernels import Routing, SlotMap, moe_mlp, route

HALF = Case("half", trainable=0.5)
MEDIUM = Shape("medium", 2048, 512, 256, 16, 4)


class Skipped(Exception):  # noqa: N818 - it is not an error
    """A check that cannot be made here; its message says why."""


def checks(device: str, backend: str, *, tiny: bool) -> Mapping[str, Check]:
    """List all checks of this file by name."""

    def bind(run: Callable[..., str], *args: Any) -> Check:
        return lambda: run(*args, device, backend)

    found: dict[str, Check] = {}
    for dtype in (torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        found[f"{short}: bitwise rerun"] = bind(_rerun, TINY[0] if tiny else MEDIUM, dtype)
        for name, rows in (("tiles chosen by the plan", 64), ("tiles by default", None)):
            found[f"{short}: clients of a cohort get the bits each gets alone, {name}"] = bind(_cohort, rows, dtype)
        found[f"{short}: z made again gives the same bits"] = bind(_recompute, dtype)
        found[f"{short}: a CUDA graph of route, forward and backward"] = bind(_graph, dtype)
        found[f"{short}: nothing waits for the device"] = bind(_no_wait, dtype)
    found["torch.compile(fullgraph=True)"] = bind(_compiled)
    return MappingProxyType(found)


def every(device: str, backend: str, *, tiny: bool) -> Mapping[str, Check]:
    """List the checks of correct.py and of this file by name, but for the large ones."""
    return {**correct.checks(device, backend, tiny=tiny), **checks(device, backend, tiny=tiny)}


def large_checks(device: str, backend: str, *, tiny: bool) -> Mapping[str, Check]:
    """List the checks that want the GPU's memory for themselves."""
    found = large_cases()
    whole = TINY[0] if tiny else STANDARD[0]
    checks: dict[str, Check] = {
        f"bfloat16: bitwise rerun, {whole.name}": lambda: _rerun(whole, torch.bfloat16, device, backend),
        "offsets beyond 2^31, rows": lambda: _far(*found["offsets beyond 2^31, rows"], device, backend),
        "offsets beyond 2^31, weights": lambda: _far(*found["offsets beyond 2^31, weights"], device, backend),
    }
    return MappingProxyType(checks)


def large_cases() -> dict[str, tuple[Shape, Case]]:
    """List the large checks' problems by their names."""
    rows = Shape("far rows", 65536, 256, 2816, 8, 8), Case("all")
    weights = Shape("far weights", 2048, 2560, 4096, 128, 2), Case("eighth trainable", trainable=1 / 8)
    return {
        f"bfloat16: bitwise rerun, {STANDARD[0].name}": (STANDARD[0], HALF),
        "offsets beyond 2^31, rows": rows,
        "offsets beyond 2^31, weights": weights,
    }


def _alike(got: Outcome, want: Outcome) -> str:
    assert got.keys() == want.keys()
    off = [name for name, value in want.items() if not torch.equal(got[name], value)]
    assert not off, f"other bits in {', '.join(off)}"
    return f"the same bits in {', '.join(want)}"


def _rerun(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> str:
    run = step(fedmoe(backend), problem(shape, HALF, device=device, dtype=dtype))
    first = {name: value.clone() for name, value in run().items()}
    for _ in range(3):
        poison(device)
        said = _alike(run(), first)
    return said


class _Client(NamedTuple):
    """One client's tokens and masks, and its experts, full storage."""

    task: Problem
    permitted_E: Tensor
    trainable_E: Tensor


def _clients(dtype: torch.dtype, device: str) -> list[_Client]:
    """Make three clients of very different sizes, so that tiles chosen by the cohort's rows would show."""
    found = []
    for seed, tokens in enumerate((700, 33, 1)):
        case = Case("client", permitted=(0.5, 1.0, 0.25)[seed], trainable=(0.5, 0.0, 1.0)[seed])
        shape = Shape("client", tokens, *((512, 256) if device == "cuda" else (32, 16)), 8, 2)
        task = problem(shape, case, seed=seed, device=device, dtype=dtype)
        found.append(_Client(task, task.permitted_E, task.trainable_E))
    return found


def _cohort(rows_per_slot: int | None, dtype: torch.dtype, device: str, backend: str) -> str:
    clients = _clients(dtype, device)
    # Alone a client is a cohort of one where the plan gives no number: then the default of cohorts holds for both.
    alone = [_together([client], rows_per_slot, device, backend)[0] for client in clients]
    for client, got, want in zip(clients, _together(clients, rows_per_slot, device, backend), alone, strict=True):
        _alike(got, want)
        hold(errors(want, truth(client.task)), 1e-2)
    pair = _together(clients[1:], rows_per_slot, device, backend)
    for got, want in zip(pair, alone[1:], strict=True):
        said = _alike(got, want)
    return f"{said}; of 3 clients, each alone, in a pair and in all"


def _together(clients: list[_Client], rows_per_slot: int | None, device: str, backend: str) -> list[Outcome]:
    """Run the clients in one launch; return what each gets."""
    permitted_CE, trainable_CE = (torch.stack([client[i] for client in clients]) for i in (1, 2))
    slot_map = SlotMap.build(permitted_CE, trainable_CE, rows_per_slot=rows_per_slot)
    owner_B, ids_B = slot_map.client_of_slot_B, slot_map.expert_of_slot_B
    tasks = [client.task for client in clients]
    held = {n: torch.stack([task.stacks[n] for task in tasks])[owner_B, ids_B] for n in tasks[0].stacks}
    stacks = {n: stored(full, trainable_CE) for n, full in held.items()}
    x_TH, s_TK = (leaf(torch.cat([getattr(task, name) for task in tasks])) for name in ("x_TH", "weights_TK"))
    sizes = [task.shape.T for task in tasks]
    client_T = torch.repeat_interleave(torch.arange(len(tasks), device=device), torch.tensor(sizes, device=device))
    experts_TK = torch.cat([task.experts_TK for task in tasks])
    routing = Routing.from_topk(experts_TK, s_TK, slot_map, client_T=client_T, backend=backend)
    poison(device)
    y_TH = moe_mlp(x_TH, routing, backend=backend, **stacks)
    y_TH.backward(torch.cat([task.dy_TH for task in tasks]))
    assert x_TH.grad is not None
    assert s_TK.grad is not None
    parts = zip(*(t.split(sizes) for t in (y_TH.detach(), x_TH.grad, s_TK.grad)), strict=True)
    found = [dict(zip(("y", "dx", "ds"), part, strict=True)) for part in parts]
    for c, outcome in enumerate(found):
        mine_B = owner_B[: int(trainable_CE.sum())] == c
        grads = {f"d{n}": stack.trainable.grad for n, stack in stacks.items()}
        outcome |= {n: grad[mine_B] for n, grad in grads.items() if grad is not None and bool(mine_B.any())}
    return found


def _recompute(dtype: torch.dtype, device: str, backend: str) -> str:
    task = small(dtype, device)
    found = []
    for recompute in (False, True):
        x_TH = leaf(task.x_TH)
        routing = Routing.from_topk(task.experts_TK, task.weights_TK, SlotMap.build(task.permitted_E))
        stacks = {name: leaf(full) for name, full in task.stacks.items()}
        y_TH = moe_mlp(x_TH, routing, recompute=recompute, backend=backend, **stacks)
        y_TH.backward(task.dy_TH)
        grads = {"dx": x_TH} | {f"d{name}": value for name, value in stacks.items()}
        found.append({"y": y_TH.detach()} | {n: v.grad for n, v in grads.items() if v.grad is not None})
    return _alike(found[1], found[0])


class _Layer(NamedTuple):
    """Router logits to y as a client's layer runs it, over leaves that stay where they are."""

    logits_TE: Tensor
    x_TH: Tensor
    dy_TH: Tensor
    run: Callable[[], Tensor]
    leaves: dict[str, Tensor]

    def step(self) -> Outcome:
        self.forget()
        y_TH = self.run()
        y_TH.backward(self.dy_TH)
        return {"y": y_TH.detach()} | {f"d{n}": v.grad for n, v in self.leaves.items() if v.grad is not None}

    def forget(self) -> None:
        for value in self.leaves.values():
            value.grad = None


def _layer(dtype: torch.dtype, device: str, backend: str) -> _Layer:
    task = problem(Shape("layer", 512, 512, 256, 16, 4), Case("half", 0.5, trainable=0.5), device=device, dtype=dtype)
    slot_map = SlotMap.build(task.permitted_E, task.trainable_E)
    stacks = {n: stored(full[slot_map.expert_of_slot_B], task.trainable_E) for n, full in task.stacks.items()}
    logits_TE, x_TH = leaf(torch.randn(512, 16, device=device)), leaf(task.x_TH)

    def run() -> Tensor:
        routing = route(logits_TE, task.shape.K, permitted_E=slot_map, backend=backend)
        return moe_mlp(x_TH, routing, backend=backend, **stacks)

    leaves = {"logits": logits_TE, "x": x_TH} | {name: stack.trainable for name, stack in stacks.items()}
    return _Layer(logits_TE, x_TH, task.dy_TH, run, leaves)


def _graph(dtype: torch.dtype, device: str, backend: str) -> str:
    """Capture a graph on one set of tokens, replay it on others: other rows per slot in the same memory."""
    if device != "cuda":
        raise Skipped("CUDA graphs need a GPU")
    layer, kept = _layer(dtype, device, backend), {}

    def captured() -> None:
        kept.update(layer.step())

    graph = capture(captured, layer.forget)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in (layer.logits_TE, layer.x_TH, layer.dy_TH):
                value.copy_(torch.randn_like(value))
        graph.replay()
        replayed = {name: value.clone() for name, value in kept.items()}
        said = _alike(replayed, layer.step())
    return f"replayed on two other sets of tokens: {said}"


def _no_wait(dtype: torch.dtype, device: str, backend: str) -> str:
    if device != "cuda":
        raise Skipped("torch.cuda.set_sync_debug_mode needs a GPU")
    layer = _layer(dtype, device, backend)
    layer.step()
    torch.cuda.synchronize()
    with _forbidden_to_wait():
        layer.step()
    return "route, forward and backward under torch.cuda.set_sync_debug_mode('error')"


@contextmanager
def _forbidden_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _compiled(device: str, backend: str) -> str:
    layer = _layer(torch.float32, device, backend)
    want = {name: value.clone() for name, value in layer.step().items()}
    compiled = layer._replace(run=torch.compile(layer.run, fullgraph=True, backend="aot_eager"))
    return hold(errors(compiled.step(), want), 1e-6)


def _far(shape: Shape, case: Case, device: str, backend: str) -> str:
    """Check a product where T * K * F or E * F * H is above 2^31: in 32 bits it lands in another row or expert."""
    if device != "cuda":
        raise Skipped("it takes 40 GB of GPU memory")
    free = torch.cuda.mem_get_info()[0]
    if free < 40e9:
        raise Skipped(f"it takes 40 GB of GPU memory, {free / 1e9:.0f} GB are free")
    assert max(shape.T * shape.K * shape.F, shape.E * shape.F * shape.H) > 2**31
    task = problem(shape, case, device=device, dtype=torch.bfloat16)
    want = truth(task)
    return hold(errors(step(fedmoe(backend), task)(), want), 1e-2)
