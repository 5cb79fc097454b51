"""The part `kernels`: every launch of a step timed alone, cold, next to its prediction made without a GPU.

The cases are those of bench/aot/cases.py, so that a line here answers a line of the table that `make aot` keeps in
bench/results. The prediction is made here from the code that runs, so of the triton that is installed, and for the GPU
at hand; the table's own is for the GPU that stands for an architecture (an H100 for sm_90).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.aot.cases import CASES, Case, inputs_of, needs_of
from bench.common.clock import Clock
from bench.common.roofline import Gpu, Work, expected
from bench.gpu.measure.store import Record
from fedmoe_kernels import Routing, SlotMap
from fedmoe_kernels.experts.op_inputs import OpInputs
from fedmoe_kernels.gpu.experts import driver as experts
from fedmoe_kernels.gpu.launch import Execute, Launch
from fedmoe_kernels.gpu.routing import driver as routing
from fedmoe_kernels.gpu.routing.choose import Rule

__all__ = ["CASES", "TINY", "measure", "prediction"]
WARM_UP = 3
# For a rehearsal in Triton's interpreter.
TINY = (
    Case("tiny", 24, 32, 16, 4, 2, 2, bias=True, dtype=torch.float32, E=4),
    Case("tiny, adapters", 12, 32, 16, 4, 1, 0, rank=4, clients=2, dtype=torch.float32, E=4),
)


class _Stopwatch:
    """Runs launches and keeps the milliseconds of each, by its place in the step."""

    def __init__(self, device: str, case: Case, gpu: Gpu | None) -> None:
        self.clock, self.place = Clock(device), 0
        self.times: list[list[float]] = []
        self.launches: list[Launch] = []
        self.likely: list[float | None] = []
        self._case, self._gpu = case, gpu
        self._marks: list[tuple[Any, Any]] = []

    def __call__(self, launch: Launch) -> None:
        if len(self.launches) == self.place:
            # Only what a row needs: the arguments would keep every tensor of the step.
            self.launches.append(Launch(launch.kernel, launch.grid, {}, 0, 0, launch.flops, launch.bytes))
            self.times.append([])
            self.likely.append(prediction(self._case, launch, self._gpu))
        self.clock.start()
        first = self.clock.mark()
        launch.run()
        self._marks.append((first, self.clock.mark()))
        self.place += 1

    def end_step(self, *, keep: bool) -> None:
        for times, (first, last) in zip(self.times, self._marks, strict=True):
            if keep:
                times.append(self.clock.milliseconds(first, last))
        self._marks, self.place = [], 0


def measure(case: Case, device: str, gpu: Gpu | None, rounds: int) -> list[Record]:
    """Make a row for each launch of a step, in order: what it is, its time, its rate and its share of its roofline."""
    watch = _Stopwatch(device, case, gpu)
    steps(case, device, WARM_UP + rounds, watch, lambda turn: watch.end_step(keep=turn >= WARM_UP))
    return [
        _row(place, launch, statistics.median(times), case, gpu) | {"expected ms": likely}
        for place, (launch, times, likely) in enumerate(zip(watch.launches, watch.times, watch.likely, strict=True))
    ]


def steps(
    case: Case, device: str, count: int, execute: Execute = Launch.run, after: Callable[[int], None] = lambda turn: None
) -> None:
    """Run whole steps of a case, routing included; `execute` gets every launch, `after` each step's number."""
    inputs, dy_TH = real_inputs(case, device)
    needs = needs_of(case)
    how: dict[str, Any] = {"activation": case.activation, "rows_per_slot": case.rows_per_slot, "execute": execute}
    for turn in range(count):
        _route(case, device, execute)
        _, z_RF, _ = experts.forward(inputs, keep_z=case.keep_z, want_reap=True, **how)
        experts.backward(dy_TH, z_RF, inputs, needs=needs, **how)
        del z_RF
        after(turn)


def _row(place: int, launch: Launch, ms: float, case: Case, gpu: Gpu | None) -> Record:
    name = launch.name
    least = None if gpu is None else 1e3 * Work(name, launch.flops, launch.bytes).seconds(gpu)
    return {
        "case": case.name,
        "place": place,
        "kernel": name,
        "ms": ms,
        "flops": launch.flops,
        "bytes": launch.bytes,
        "TFLOP/s": launch.flops / ms / 1e9,
        "TB/s": launch.bytes / ms / 1e9,
        "roofline ms": least,
        "percent_of_roofline": 100 * least / ms if least else None,
    }


def prediction(case: Case, launch: Launch, gpu: Gpu | None) -> float | None:
    """Predict the milliseconds of a launch on `gpu` from its code, which the cache has once it was launched or carried.

    None without a GPU, for float32 (the peaks are bfloat16's), and where nothing is launched.
    """
    if gpu is None or case.dtype == torch.float32 or 0 in launch.grid:
        return None
    # Not at the top: both read the compiler's own files, which an interpreter's run has no use for.
    from bench.aot.sass import code_of, job_of
    from bench.aot.table import Row

    job = job_of(launch, gpu.arch)
    row = Row(case, launch, job, code_of(job), ())
    return 1e3 * expected(Work(row.name, launch.flops, launch.bytes), gpu, row.tiling())


def _route(case: Case, device: str, execute: Execute) -> None:
    """Route the case, forward and backward, from logits; each client holds its first experts."""
    draw = torch.Generator(device).manual_seed(1)
    held = case.B // case.clients
    table_CE = torch.full((case.clients, case.E), -1, dtype=torch.int64, device=device)
    table_CE[:, :held] = torch.arange(case.B, device=device).view(case.clients, held)
    client_T = torch.arange(case.T, device=device) * case.clients // case.T if case.clients > 1 else None
    logits_TE = torch.randn(case.T, case.E, device=device, generator=draw)
    bias_E = torch.randn(case.E, device=device, generator=draw) if case.scoring == "sigmoid" else None
    rule = Rule(case.K, case.scoring, True, *case.groups)
    how: dict[str, Any] = {"num_slots": case.B, "execute": execute}
    who = routing.Holders(table_CE, client_T, None)
    routed = routing.route(logits_TE, who, bias_E, rule, with_stats=True, **how)
    routing.route_backward(routed[0], logits_TE, routed[1], who, rule, execute=execute)


def real_inputs(case: Case, device: str) -> tuple[OpInputs, Tensor]:
    """Make the operator's tensors with random values and routing, shaped and typed as by `aot.cases.inputs_of`."""
    draw = torch.Generator(device).manual_seed(0)

    def filled(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.randint(0, 127, like.shape, dtype=like.dtype, device=device, generator=draw)
        value = torch.randn(like.shape, device=device, generator=draw) / like.shape[-1] ** 0.5
        return value.to(like.dtype)

    fields = {name: None if like is None else filled(like) for name, like in inputs_of(case)._asdict().items()}
    choice_TK = torch.rand(case.T, case.B, device=device, generator=draw).topk(case.K).indices
    weights_TK = torch.rand(case.T, case.K, device=device, generator=draw).softmax(-1)
    everyone = SlotMap.build(torch.ones(case.B, dtype=torch.bool, device=device))
    record = Routing.from_topk(choice_TK, weights_TK, everyone)
    fields |= {name: getattr(record, name) for name in OpInputs._fields[1:6]}
    if case.rank:
        slots = torch.arange(case.B, device=device)
        fields["base_of_slot_B"] = slots % (case.B // case.clients)
    x_TH, dy_TH = (torch.randn(case.T, case.H, device=device, generator=draw).to(case.dtype) for _ in range(2))
    return OpInputs(**fields | {"x_TH": x_TH}), dy_TH
