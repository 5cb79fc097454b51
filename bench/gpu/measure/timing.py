"""The part `time`: every contender on every client case of a shape, interleaved, after its results have been compared.

A row is one contender, one pass ("fwd", "bwd", "fwd+bwd") and one way of launching. That is "eager", cold and with the
host ahead of the device; "sustained", steps back to back for two seconds, as training runs them, at the clocks that
the power then allows; or for few tokens also "graph", the replay of a CUDA graph.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from bench.aot.dry_step import launches_of, predicted
from bench.common import machine
from bench.common.cases import GRAPHED_TOKENS, Case, Problem, Shape, problem, redrawn
from bench.common.clock import Clock, Memory
from bench.common.peers import Contender, Outcome, errors, leaf, outcome
from bench.common.roofline import Gpu, Layer, backward, forward, least_seconds
from bench.common.truth import truth
from bench.gpu.measure.launch import PASSES, Seat, Times, capture, eager, sustained
from bench.gpu.measure.store import Record, Store, sentence
from fedmoe_kernels.tiles.lookup import arch_of

ROUNDS, WARM_UP = 25, 5
SETS = 3  # of tokens, which the rounds rotate through
SUSTAINED_SECONDS = 2.0
# What fedmoe is held to, and what a peer may be off before its time means nothing. Some peers sum gradients of routing
# weights or of x in half precision.
OWN = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-5}
PEER = {torch.bfloat16: 5e-2, torch.float16: 5e-2, torch.float32: 1e-4}


class DeadDeviceError(RuntimeError):
    """The CUDA context is lost; nothing more can be run in this process."""


@dataclass(frozen=True)
class Plan:
    """How a case is measured.

    Attributes:
        device, dtype: where and in what.
        gpu: peaks for the rooflines, None = unknown.
        rounds: timed rounds; in a round every contender runs once.
        sustained: seconds of steps back to back for each contender, 0 = none.
    """

    device: str
    dtype: torch.dtype
    gpu: Gpu | None
    rounds: int
    sustained: float


def run_case(shape: Shape, case: Case, contenders: Sequence[Contender], plan: Plan, store: Store) -> None:
    """Measure one case, unless the store has it finished with these contenders; rows of an earlier run go with the new.

    A contender is compared with float64 on the very data that is timed; one that is wrong there is not timed.
    """
    key = {"shape": shape.name, "case": case.name, "dtype": str(plan.dtype).removeprefix("torch.")}
    asked = [contender.name for contender in contenders]
    if any(set(asked) <= set(found.get("contenders", asked)) for found in store.find("finished", **key)):
        return
    began, before = time.perf_counter(), machine.clocks()
    task = problem(shape, case, device=plan.device, dtype=plan.dtype)
    tasks = [task, *(redrawn(task, seed) for seed in range(1, SETS))]
    want = truth(task)
    seats = [seat for c in contenders if (seat := _admit(c, tasks, want, store, key, plan))]
    del want
    if any(seat.contender.name == "fedmoe" for seat in seats):
        store.replace("rows", key, _measure(seats, task, plan, store, key))
    about = {"seconds": round(time.perf_counter() - began, 1), "tau": round(task.tau, 4), "contenders": asked}
    clocks = {"clocks before": before, "clocks after": machine.clocks()}
    store.replace("finished", key, [key | about | clocks])


def _measure(seats: list[Seat], task: Problem, plan: Plan, store: Store, key: Record) -> list[Record]:
    """Measure the rows of all contenders that take part."""
    rows = [_row(seat, key, task, plan) for seat in seats]
    cold, host = eager(seats, plan.device, (WARM_UP, plan.rounds))
    passes = {(seat.contender.name, name) for seat in seats for name in seat.passes}
    times = {"eager": {key: found for key, found in cold.items() if key in passes}}
    if plan.sustained:
        times["sustained"] = {
            (seat.contender.name, seat.passes[-1]): sustained(seat, plan.device, plan.sustained) for seat in seats
        }
    power = {seat.contender.name: seat.power[-1] if seat.power else None for seat in seats}
    if plan.device == "cuda" and task.shape.T <= GRAPHED_TOKENS:
        times["graph"] = _graphs(seats, plan, store, key)
    least = _least(task, plan.gpu)
    timed = [
        row
        | {"launch": launch, "pass": name}
        | _times(seconds[seat.contender.name, name], task, name, least)
        | (_host(host[seat.contender.name, name]) if launch == "eager" else {})
        | ({"clocks": power[seat.contender.name]} if launch == "sustained" else {})
        for launch, seconds in times.items()
        for seat, row in zip(seats, rows, strict=True)
        for name in PASSES
        if (seat.contender.name, name) in seconds
    ]
    peers = (seat.contender for seat in seats)
    _set_ratios(timed, {peer.name for peer in peers if peer.stores_all and peer.compares and peer.backward})
    return timed


def _admit(
    contender: Contender, tasks: list[Problem], want: Outcome, store: Store, key: Record, plan: Plan
) -> Seat | None:
    """Make a seat for a contender that can run the case and is right there; else the reason goes on record."""
    named = key | {"peer": contender.name, "detail": contender.detail, "launch": "eager"}
    if store.find("left_out", **key, peer=contender.name, launch="eager"):
        return None
    reason = contender.refuses(tasks[0])
    if reason is not None:
        return _leave_out(store, named, "unsupported", reason)
    if store.find("attempts", **key, peer=contender.name, launch="eager"):
        return _leave_out(store, named, "died", "an earlier process ended while it ran; it is not tried again")
    try:
        with store.attempt(named) if contender.risky else nullcontext():
            leaves = [(leaf(task.x_TH), leaf(task.weights_TK)) for task in tasks]
            seat = Seat(contender, contender.bind(tasks[0]), tasks, leaves, {}, [], [])
            began = time.perf_counter()
            if contender.compares:
                seat.errors.update(_compare(seat, want))
                seat.first.append(time.perf_counter() - began)
    except Exception as error:
        _leave_out(store, named, "failed", sentence(error))
        _check_alive(plan.device)
        return None
    tolerance = (OWN if contender.name.startswith("fedmoe") else PEER)[plan.dtype]
    wrong = {name: error for name, error in seat.errors.items() if not error < tolerance}
    if wrong:
        found = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        return _leave_out(store, named, "wrong", f"relative error against float64 not under {tolerance:.0e}: {found}")
    return seat


def _leave_out(store: Store, named: Record, status: str, reason: str) -> None:
    store.add("left_out", [named | {"status": status, "reason": reason}])


def _compare(seat: Seat, want: Outcome) -> dict[str, float]:
    """Compute relative errors of y and every gradient on the first set of tokens."""
    seat.forget()
    y = seat.forward(0)
    seat.backward(y, 0)
    found = errors(outcome(seat.bound, y, *seat.leaves[0]), want if seat.contender.backward else {"y": want["y"]})
    seat.forget()
    return found


def _memory(seat: Seat, device: str) -> Record:
    """Measure MB of 10^6 bytes: `kept` between the passes with y, `step` at the peak of one step, `held` as weights."""
    if device == "cuda":
        gc.collect()
    seat.forget()
    memory = Memory(device)
    y = seat.forward(0)
    kept = memory.now()
    seat.backward(y, 0)
    peak = memory.peak()
    del y
    seat.forget()
    if kept is None or peak is None:
        return {"MB": None, "MB kept": None, "MB step": None, "MB held": seat.bound.held / 1e6}
    held = seat.bound.held
    return {"MB": (held + peak) / 1e6, "MB kept": kept / 1e6, "MB step": peak / 1e6, "MB held": held / 1e6}


def _predicted(seat: Seat, task: Problem, plan: Plan) -> Record:
    """Return what the closed forms of the kernels' memory say that fedmoe will need, None for others."""
    if plan.device != "cuda" or not seat.contender.name.startswith("fedmoe") or seat.contender.graphed:
        return {"MB predicted": None, "MB kept predicted": None, "launches": None}
    recompute = seat.contender.name == "fedmoe-recompute"
    how: Record = {"dtype": plan.dtype, "recompute": recompute}
    where = task.shape, task.case, arch_of("cuda")
    sizes = predicted(*where, **how)
    said = {"MB predicted": (seat.bound.held + sizes.peak) / 1e6, "MB kept predicted": sizes.kept / 1e6}
    return said | {"launches": sum(0 not in launch.grid for launch in launches_of(*where, **how))}


def _graphs(seats: Sequence[Seat], plan: Plan, store: Store, key: Record) -> Times:
    """Time replays of captured graphs, forward alone and both; contenders that cannot be captured go on record."""
    graphs: dict[tuple[str, str], torch.cuda.CUDAGraph] = {}
    for seat in (seat for seat in seats if not seat.contender.graphed):
        named = key | {"peer": seat.contender.name, "detail": seat.contender.detail, "launch": "graph"}
        if store.find("left_out", **key, peer=seat.contender.name, launch="graph"):
            continue
        if seat.contender.waits:  # a capture that fails may lose the context, and with it what a peer has tuned
            _leave_out(store, named, "unsupported", "waits for the device, which no graph can capture")
            continue
        if store.find("attempts", **key, peer=seat.contender.name, launch="graph"):
            _leave_out(store, named, "died", "an earlier process ended while it was captured; it is not tried again")
            continue
        try:
            with store.attempt(named):
                graphs[seat.contender.name, "fwd"] = capture(lambda seat=seat: seat.forward(0), seat.forget)
                if seat.contender.backward:
                    graphs[seat.contender.name, "fwd+bwd"] = capture(
                        lambda seat=seat: seat.backward(seat.forward(0), 0), seat.forget
                    )
        except Exception as error:
            _leave_out(store, named, "failed", sentence(error))
            _check_alive(plan.device)
    clock, times = Clock(plan.device), {key: [] for key in graphs}
    for turn in range(WARM_UP + plan.rounds):
        for name, graph in graphs.items():
            clock.start()
            first = clock.mark()
            graph.replay()
            last = clock.mark()
            if turn >= WARM_UP:
                times[name].append(clock.milliseconds(first, last))
    return times


def _row(seat: Seat, key: Record, task: Problem, plan: Plan) -> Record:
    """Collect what all rows of a contender in a case share."""
    contender = seat.contender
    named = {"sizes": list(task.shape.sizes), "peer": contender.name, "detail": contender.detail}
    named["stores_all"] = contender.stores_all
    found = {name: _number(error) for name, error in seat.errors.items()}
    source = None if plan.gpu is None else plan.gpu.source
    measured = _memory(seat, plan.device) | _predicted(seat, task, plan)
    first = {"first step s": round(seat.first[0], 3) if seat.first else None}
    return key | named | {"errors": found, "roofline of": source} | first | measured


def _least(task: Problem, gpu: Gpu | None) -> dict[str, tuple[float | None, int]]:
    """Return the least milliseconds (None for an unknown GPU) and bytes of every pass, for a client's own experts."""
    layer = layer_of(task)
    fwd, bwd = forward(layer), backward(layer)
    passes = {"fwd": fwd, "bwd": bwd, "fwd+bwd": (*fwd, *bwd)}
    return {
        name: (None if gpu is None else 1e3 * least_seconds(stages, gpu), sum(work.bytes for work in stages))
        for name, stages in passes.items()
    }


def layer_of(task: Problem) -> Layer:
    """Describe a problem for the closed forms; only slots that get rows count, for the others need not be read."""
    shape, itemsize = task.shape, task.x_TH.element_size()
    busy_E = torch.bincount(task.experts_TK.flatten(), minlength=shape.E) > 0
    slots, learning = int(busy_E.sum()), int((busy_E & task.trainable_E).sum())
    gated = shape.F == 2 * shape.I
    return Layer(shape.T, shape.H, shape.I, slots, shape.K, learning, gated, task.tau, itemsize)


def _times(values: list[float], task: Problem, name: str, least: dict[str, tuple[float | None, int]]) -> Record:
    ms, roof = statistics.median(values), least[name][0]
    share = {"fwd": 1 / 3, "bwd": (1 + task.tau) / 3, "fwd+bwd": (2 + task.tau) / 3}[name]
    return {
        "ms": ms,
        "ms quartiles": statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [ms, ms],
        "rounds": len(values),
        "TFLOP/s": task.shape.flops * share / ms / 1e9,
        "TB/s": least[name][1] / ms / 1e9,
        "roofline ms": least[name][0],
        "percent_of_roofline": 100 * roof / ms if roof is not None else None,
    }


def _host(values: list[float]) -> Record:
    """Return the host's time for a pass; where it is longer than the device's, only a graph gets the device's."""
    return {"host ms": statistics.median(values)}


def _set_ratios(rows: list[Record], peers: set[str]) -> None:
    """Write how many times faster than the best of the peers that store all experts, launched in the same way."""
    for row in rows:
        same = [r for r in rows if r["pass"] == row["pass"] and r["launch"] == row["launch"] and r["peer"] in peers]
        best = min(same, key=lambda r: r["ms"], default=None)
        row["best_peer"] = best and best["peer"]
        row["ratio_to_best_peer"] = best["ms"] / row["ms"] if best else None


def _check_alive(device: str) -> None:
    """Raise when an error has taken the CUDA context with it."""
    if device != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1).item()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeadDeviceError(sentence(error)) from error


def _number(value: float) -> float | str:
    """Make a float that JSON can hold."""
    return float(f"{value:.3g}") if math.isfinite(value) else str(value)
