"""Every case of the ahead-of-time table, and more at the edges, launched by Triton's own runtime without a GPU.

    python -m bench.stand_in.run                                  # all, as on sm_90
    python -m bench.stand_in.run --arch sm_80 --case "qwen3, adapters of rank 64" --case odd

A line of JSON for each case: launches, descriptors, what was refused, and what no CUDA graph could hold. The exit code
is 1 where anything was. Sizes are real: tensors are CPU memory that nothing touches. What is compiled stays in
TRITON_CACHE_DIR, so that this also warms the cache of a GPU machine with the same triton. `--public` takes the cases
through `route` and `moe_mlp`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.aot.cases import CASES, MORE, PASSES, QWEN, SWITCH, Case, inputs_of, step
from bench.common.capture import findings_of
from bench.stand_in import driver as stand_in
from fedmoe_kernels import ExpertLora, ExpertScores, ExpertWeights, Quantized, SlotMap, moe_mlp, route
from fedmoe_kernels.experts import ops as expert_ops
from fedmoe_kernels.gpu.experts import call
from fedmoe_kernels.gpu.launch import Launch
from fedmoe_kernels.routing import ops as routing_ops

FEW = replace(QWEN, T=4096, B=16, Bt=4)  # 1/8 of the slots, and the same kernels
EDGES = (
    replace(QWEN, name="qwen3, adapters of rank 128", rank=128, Bt=0),
    replace(QWEN, name="no tokens", T=0),
    replace(QWEN, name="no tokens, adapters of a cohort", T=0, rank=16, clients=4, Bt=0),
    replace(QWEN, name="one token", T=1),
    replace(QWEN, name="777 tokens", T=777),
    replace(QWEN, name="nothing trains", Bt=0),
    replace(QWEN, name="everything trains", Bt=128),
    replace(QWEN, name="nothing trains, int8", Bt=0, format="int8"),
    replace(QWEN, name="nothing trains, int4, z recomputed", Bt=0, format="int4", keep_z=False),
    replace(QWEN, name="a cohort of 4", clients=4, scoring="topk_softmax"),
    replace(SWITCH, name="one choice, no tokens", T=0),
    replace(FEW, name="float32, adapters", H=512, I=256, dtype=torch.float32, rank=16, Bt=0),
    replace(FEW, name="off 16 bytes"),
    replace(FEW, name="off 16 bytes, int8", format="int8"),
    replace(FEW, name="off 16 bytes, nvfp4, few rows", T=256, format="nvfp4"),
)
ALL = CASES + MORE + EDGES
# Those that go through `route` and `moe_mlp` too: plain, one choice, adapters of a cohort, codes.
PUBLIC = (
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "switch-base-8",
    "qwen3, adapters of 4 clients",
    "qwen3, int8",
    "qwen3, nvfp4, 128 rows a slot",
    "no tokens",
)


def shifted(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor like it that starts 8 bytes past a multiple of 16, as a view into a flat buffer may."""
    if tensor is None:
        return None
    skip = 8 // tensor.element_size()
    flat = torch.empty(tensor.numel() + skip, dtype=tensor.dtype)
    assert flat.data_ptr() % 16 == 0
    return flat[skip:].view(tensor.shape)


def by_drivers(case: Case, arch: str) -> None:
    """Run routing, forward and backward of the case through the operators' drivers."""
    driven(case, arch)()


def driven(case: Case, arch: str) -> Callable[[], None]:
    """Make the case's tensors, and return a step of the operators' drivers on them."""
    inputs = inputs_of(case, "cpu")
    if case.name.startswith("off 16 bytes"):
        inputs = type(inputs)(*map(shifted, inputs))
    return lambda: step(case, arch, dict.fromkeys(PASSES, Launch.run), inputs=inputs, device="cpu")


@contextmanager
def served(arch: str) -> Iterator[None]:
    """Let the operators take the kernels for tensors of the CPU, with the tiles of `arch`; needs an active stand-in."""

    # A plain function: a Mock takes 15 us a call, which bench/host.py would count as the operator's.
    def yes(*_: Any, **__: Any) -> bool:
        return True

    with (
        mock.patch.object(expert_ops, "use_triton", yes),
        mock.patch.object(routing_ops, "use_triton", yes),
        mock.patch.object(call, "arch_of", return_value=arch),
    ):
        yield


def slot_map_of(case: Case) -> SlotMap:
    """Number the case's slots: each client holds its first experts and trains the first of them."""
    held, trains = case.B // case.clients, (case.B if case.rank else case.Bt) // case.clients
    ids = torch.arange(case.E).expand(case.clients, case.E)
    masks = (ids < held, ids < trains)
    if case.clients == 1:
        return SlotMap.build(*(mask[0] for mask in masks), rows_per_slot=case.rows_per_slot)
    return SlotMap.build(*masks, rows_per_slot=case.rows_per_slot)


def leaves_of(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Make what `moe_mlp` takes of the case: x, weights or factors, and scores; and what of it has a gradient."""
    inputs = inputs_of(case, "cpu")
    options: dict[str, Any] = {"activation": case.activation, "recompute": not case.keep_z}
    options["scores"] = ExpertScores(case.B)
    leaves = [inputs.x_TH.requires_grad_(), options["scores"].leaf_B7]
    names = ("w_in", "w_out", "bias_in", "bias_out") if case.bias else ("w_in", "w_out")
    if case.rank:
        options |= {name: getattr(inputs, name) for name in names}
        factors = [getattr(inputs, name).requires_grad_() for name in ("a_in", "b_in", "a_out", "b_out")]
        options["lora"] = ExpertLora(*factors, base_of_slot_B=inputs.base_of_slot_B)
        return [*leaves, *factors], options
    for name in names:
        frozen = getattr(inputs, f"{name}_frozen")
        scale, whole = (getattr(inputs, f"{name}_{kind}", None) for kind in ("scale", "whole"))
        rest = frozen if scale is None or frozen is None else Quantized(frozen, scale, case.format, whole)
        options[name] = ExpertWeights(getattr(inputs, name).requires_grad_(), rest)
        leaves.append(options[name].trainable)
    return leaves, options


def called(case: Case, arch: str) -> Callable[[], None]:
    """Make the case's tensors, and return a step through `route` and `moe_mlp` and back, as a model takes it."""
    leaves, options = leaves_of(case)
    logits_TE = torch.empty(case.T, case.E, requires_grad=True)
    client_T = torch.zeros(case.T, dtype=torch.int64) if case.clients > 1 else None
    how: dict[str, Any] = {"scoring": case.scoring, "client_T": client_T}
    if case.scoring == "sigmoid":
        how |= {"bias_E": torch.empty(case.E), "groups": case.groups}
    slot_map, matrices = slot_map_of(case), [options.pop(name) for name in ("w_in", "w_out")]

    def run() -> None:
        with served(arch):
            routing = route(logits_TE, case.K, permitted_E=slot_map, with_stats=True, **how)
            y_TH = moe_mlp(leaves[0], routing, *matrices, **options)
            torch.autograd.grad(y_TH, [logits_TE, *leaves], torch.empty_like(y_TH))

    return run


def run(case: Case, driver: stand_in.StandIn, *, public: bool = False) -> dict[str, Any]:
    """Run one case and tell what the driver saw; an error of Triton's or torch's is told, not raised.

    It runs a second time as in a capture: then nothing may wait, copy, allocate beside torch or load code.
    """
    driver.reset()
    started, error = time.perf_counter(), ""
    counts, unheld = driver.counts(), list[str]()
    try:
        once = (called if public else driven)(case, driver.arch)
        once()
        counts = driver.counts()
        with driver.capturing():
            unheld = findings_of(once)
        if driver.counts().launches != 2 * counts.launches:
            unheld.append(f"a step has {counts.launches} launches, the next one not as many")
    except Exception as refused:
        error = f"{type(refused).__name__}: {refused}"[:500]
    about: dict[str, Any] = {"arch": driver.arch, "case": case.name, "public": public, "error": error}
    about |= {"findings": [*driver.findings(), *(f"no graph can hold it: {line}" for line in unheld)]}
    return about | {**counts._asdict(), "seconds": round(time.perf_counter() - started, 2)}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.stand_in.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=stand_in.LIMITS, default="sm_90")
    parser.add_argument("--case", action="append", choices=[case.name for case in ALL], help="may be given again")
    parser.add_argument("--public", action="store_true", help="through route and moe_mlp")
    parser.add_argument("--library", type=Path, help="a folder to build the driver in and keep it")
    chosen = parser.parse_args()
    wanted = chosen.case or (PUBLIC if chosen.public else [case.name for case in ALL])
    with tempfile.TemporaryDirectory() as folder:
        driver = stand_in.activate(stand_in.build(chosen.library or Path(folder)), chosen.arch)
        refused = 0
        for case in (case for case in ALL if case.name in wanted):
            about = run(case, driver, public=chosen.public)
            refused += bool(about["error"] or about["findings"])
            print(json.dumps(about), flush=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
