"""The part `kernels`: every launch of a step timed alone, cold, next to its prediction made without a GPU.

The cases are those of aot_cases.py, so that a line here answers a line of the table that `bench/aot.py` keeps in
bench/results. Registers and instructions are known there, times only here.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from aot_cases import CASES, Case, inputs_of, needs_of
from clock import Clock
from gpu_store import Record
from roofline import Gpu, Work
from torch import Tensor

from fedmoe_kernels import Routing, SlotMap
from fedmoe_kernels.gpu import experts, routing
from fedmoe_kernels.gpu.choose import Rule
from fedmoe_kernels.gpu.launch import Execute, Launch
from fedmoe_kernels.ops import OpInputs

__all__ = ["CASES", "TINY", "measure", "predictions"]
WARM_UP = 3
# For a rehearsal in Triton's interpreter.
TINY = (
    Case("tiny", 24, 32, 16, 4, 2, 2, bias=True, dtype=torch.float32, E=4),
    Case("tiny, adapters", 12, 32, 16, 4, 1, 0, rank=4, clients=2, dtype=torch.float32, E=4),
)


class _Stopwatch:
    """Runs launches and keeps the milliseconds of each, by its place in the step."""

    def __init__(self, device: str) -> None:
        self.clock, self.place = Clock(device), 0
        self.times: list[list[float]] = []
        self.launches: list[Launch] = []
        self._marks: list[tuple[Any, Any]] = []

    def __call__(self, launch: Launch) -> None:
        if len(self.launches) == self.place:
            # Only what a row needs: the arguments would keep every tensor of the step.
            self.launches.append(Launch(launch.kernel, launch.grid, {}, 0, 0, launch.flops, launch.bytes))
            self.times.append([])
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
    inputs, dy_TH = real_inputs(case, device)
    needs = needs_of(case)
    watch = _Stopwatch(device)
    how: dict[str, Any] = {"activation": case.activation, "rows_per_slot": case.rows_per_slot, "execute": watch}
    for turn in range(WARM_UP + rounds):
        _route(case, device, watch)
        _, z_RF = experts.forward(inputs, keep_z=case.keep_z, **how)
        experts.backward(dy_TH, z_RF, inputs, needs=needs, **how)
        del z_RF
        watch.end_step(keep=turn >= WARM_UP)
    likely = predictions(Path(__file__).parent / "results", "" if gpu is None else gpu.arch)
    return [
        _row(place, launch, statistics.median(times), case, gpu)
        | {"expected ms": likely.get((case.name, name_of(launch), launch.flops))}
        for place, (launch, times) in enumerate(zip(watch.launches, watch.times, strict=True))
    ]


def name_of(launch: Launch) -> str:
    """Return the kernel's name as the ahead-of-time table has it: after its file's, where they differ."""
    function = launch.kernel.fn
    file, kernel = function.__module__.rsplit(".", 1)[-1], function.__qualname__.strip("_").removesuffix("_kernel")
    return kernel if kernel == file else f"{file}.{kernel}"


def _row(place: int, launch: Launch, ms: float, case: Case, gpu: Gpu | None) -> Record:
    name = name_of(launch)
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


def predictions(results: Path, arch: str) -> Mapping[tuple[str, str, int], float]:
    """Read milliseconds that the ahead-of-time tables expect, by case, kernel and FLOPs; of the newest triton last."""
    found: dict[tuple[str, str, int], float] = {}
    for path in sorted(results.glob("aot-*.json")):
        for row in json.loads(path.read_text()).get("rows", []):
            if row["arch"] == arch and "expected_us" in row:
                found[row["case"], row["kernel"], row["flops"]] = row["expected_us"] / 1e3
    return found


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
    routed = routing.route(logits_TE, table_CE, client_T, None, bias_E, rule=rule, with_stats=True, **how)
    routing.route_backward(*(routed[0], logits_TE, routed[1], table_CE, client_T), rule=rule, execute=execute)


def real_inputs(case: Case, device: str) -> tuple[OpInputs, Tensor]:
    """Make the operator's tensors with random values and routing, shaped and typed as by `aot_cases.inputs_of`."""
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
