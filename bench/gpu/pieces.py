"""All that the commands `first` and `second` launch, in pieces that a process under the stand-in driver can run.

A piece's name begins with its part: `kernels/CASE`, `time/SHAPE/CASE`, `correct/CHECK`, `sanitize/CHECK`,
`routing/ROUTER`, `model/TOKENS` and `tune/FAMILY/N` (eight tiles of the first walk). What is timed is read from
plan.py: a change there changes this. Nothing here computes: results are rubbish, and what compares them is taken
out.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch

from bench.common.cases import CLIENT_CASES, STANDARD, SWEEP_CASES, Case, Shape
from bench.gpu import plan
from bench.gpu.measure import behave, correct, model, routing, sanitize
from bench.gpu.measure.store import sentence

ARCH = "sm_90"
WHERE = ("cpu", "triton")  # the device and the backend of checks
TOGETHER = 8  # tiles in a piece
_DRIVER: list[Any] = []  # of this process, once it has begun
SEEN = ("truth", "errors", "hold", "poison")


def names(parts: Iterable[str]) -> list[str]:
    """List the pieces of these parts; those of `first` come first."""
    return [name for part in parts for name in PARTS[part][0]()]


def begin(library: str) -> None:
    """Make the stand-in the driver of this process, and note what the names of Triton's launchers are hashes of."""
    import triton.backends.nvidia.driver as nvidia
    from triton.runtime.build import platform_key

    from bench.stand_in import driver as stand_in

    made = nvidia.compile_module_from_src

    def noted(src: str, name: str, *args: Any, **how: Any) -> Any:
        module = made(src, name, *args, **how)
        folder = base64.b32encode(hashlib.sha256((src + platform_key()).encode()).digest()).decode().rstrip("=")
        (Path(os.environ["TRITON_CACHE_DIR"]) / folder / "hashed.txt").write_text(src)
        return module

    nvidia.compile_module_from_src = noted
    torch.set_num_threads(1)
    _DRIVER.append(stand_in.activate(Path(library), ARCH))


def launch(name: str) -> dict[str, Any]:
    """Launch a piece; kernels found in the cache and compiled, by their keys, and what ended it early."""
    from triton import knobs

    found: dict[str, Any] = {"hits": [], "misses": [], "kernels": {}, "error": ""}

    def listen(*, src: Any, metadata: Mapping[str, Any], cache_hit: bool, **_: Any) -> None:
        found["hits" if cache_hit else "misses"].append(metadata["hash"])
        found["kernels"][metadata["hash"]] = f"{src.name} ({name})"

    before = _DRIVER[0].counts().launches
    with mock.patch.object(knobs.compilation, "listener", listen):
        part, rest = name.split("/", 1)
        try:
            PARTS[part][1](rest)
        except Exception as error:
            found["error"] = sentence(error)
    return found | {"launches": _DRIVER[0].counts().launches - before}


def _kernels() -> list[str]:
    from bench.gpu.measure import kernels

    return [f"kernels/{case.name}" for case in kernels.CASES]


def _kernel(name: str) -> None:
    from bench.gpu.measure import kernels
    from bench.stand_in.run import by_drivers

    by_drivers(next(case for case in kernels.CASES if case.name == name), ARCH)


def _times() -> list[str]:
    """Read the shapes and cases from the plan's words, and make every one with z kept and with z made again."""
    parser = argparse.ArgumentParser()
    for option in ("--shapes", "--cases", "--contenders"):
        parser.add_argument(option, default="")
    found: dict[str, None] = {}
    for part in (*plan.parts("first"), *plan.parts("second")):
        if part.words[0] != "time":
            continue
        words, _ = parser.parse_known_args(part.words[1:])
        ways = ["", "/recompute"] if "fedmoe-recompute" in words.contenders.split(",") else [""]
        for shape in words.shapes.split(","):
            for case in words.cases.split(","):
                found |= dict.fromkeys(f"time/{shape}/{case}{way}" for way in ways)
    return list(found)


def _time(name: str) -> None:
    shape, case, *recompute = name.split("/")
    _dry(_named(STANDARD, shape), _named((*CLIENT_CASES, *SWEEP_CASES), case), recompute=bool(recompute))


def _named(offered: Sequence[Any], name: str) -> Any:
    return next(one for one in offered if one.name == name)


def _dry(shape: Shape, case: Case, **how: Any) -> None:
    """Launch a step on tensors of the CPU that nothing touches, so that they take no memory."""
    from bench.aot import dry_step
    from fedmoe_kernels.gpu.launch import Launch

    _, backward = dry_step.dry_step(shape, case, ARCH, Launch.run, device="cpu", **how)
    backward()


def _routers() -> list[str]:
    return [f"routing/{router.name}" for router in routing.ROUTERS]


def _routed(name: str) -> None:
    from bench.stand_in.run import served

    router = _named(routing.ROUTERS, name)
    bias_E = torch.empty(router.E) if router.scoring == "sigmoid" else None
    logits_TE = torch.empty(router.T, router.E, requires_grad=True)
    with served(ARCH):
        made = routing.by_fedmoe(router, bias_E, "cpu", "triton")(logits_TE)
        torch.autograd.grad(made.weights_TK, logits_TE, torch.empty(router.T, router.K))


def _models() -> list[str]:
    return [f"model/{sequences * length}" for sequences, length in model.REAL.batches]


def _modelled(name: str) -> None:
    """Launch what one layer of the model does: its router is transformers' own, and so is all else in it."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from bench.stand_in.run import served
    from fedmoe_bindings.transformers.stock.experts import CHECKED, fedmoe_experts
    from fedmoe_bindings.transformers.stock.forms import form_of

    real_model, T = model.REAL, int(name)
    real = functools.partial(torch.empty, dtype=torch.bfloat16, requires_grad=True)
    with torch.device("meta"):
        layer = Qwen3MoeExperts(real_model.config())
    layer.gate_up_proj = torch.nn.Parameter(real(real_model.E, 2 * real_model.inner, real_model.H))
    layer.down_proj = torch.nn.Parameter(real(real_model.E, real_model.H, real_model.inner))
    form_of(layer)
    setattr(layer, CHECKED, True)  # what is launched here computes nothing
    x_TH, weights_TK = real(T, real_model.H), real(T, real_model.K)
    with served(ARCH):
        y_TH = fedmoe_experts(layer, x_TH, torch.zeros(T, real_model.K, dtype=torch.int64), weights_TK)
        torch.autograd.grad(y_TH, [x_TH, weights_TK, *layer.parameters()], torch.empty_like(y_TH))


def _checks() -> list[str]:
    found = [name for name in correct.in_order(behave.every(*WHERE, tiny=False)) if "float64 truth" not in name]
    return [f"correct/{name}" for name in (*found, *behave.large_checks(*WHERE, tiny=False))]


def _check(name: str) -> None:
    """Launch what a check launches; the large ones on tensors without memory, graphs and compiled layers as a step."""
    large = behave.large_cases()
    for shape, case in correct.full_shapes(tiny=False):
        large[f"bfloat16: {shape.name}, {case.name}"] = shape, case
    if name in large:
        _dry(*large[name])
        return
    if any(word in name for word in ("CUDA graph", "waits for", "torch.compile")):
        dtype = getattr(torch, name.split(":")[0]) if ":" in name else torch.float32
        with _unseen():
            behave._layer(dtype, "cpu", "triton").step()
        return
    with _unseen():
        behave.every(*WHERE, tiny=False)[name]()


def _watched() -> list[str]:
    return [f"sanitize/{name}" for name in sanitize.CASES]


def _watch(name: str) -> None:
    with _unseen():
        behave.every(*WHERE, tiny=True)[name]()


@contextmanager
def _unseen() -> Iterator[None]:
    """Let the operators take the kernels on the CPU, and let nothing look at what they did not compute."""
    from bench.stand_in.run import served

    with served(ARCH), ExitStack() as stack:
        for module in (correct, behave):
            for function in (name for name in SEEN if hasattr(module, name)):
                stack.enter_context(mock.patch.object(module, function, return_value={}))
        stack.enter_context(mock.patch.object(behave, "_alike", return_value=""))
        # What compares rubbish or takes it for numbers of rows comes after all launches.
        stack.enter_context(suppress(AssertionError, IndexError))
        yield


def _families() -> list[str]:
    return plan.HOTTEST.split(",")


def _walk(family: str) -> tuple[Any, list[Any]]:
    """Return the operands and the tiles of the first walk of a family, as the part `tune` has them."""
    from bench.tune import run as tune
    from bench.tune.stages import gated, layer_of, scaled
    from fedmoe_kernels.tiles.lookup import tiles_for

    shape = STANDARD[0]
    rows = shape.T * shape.K // shape.E
    start = tiles_for(ARCH, torch.bfloat16, rows, hidden=shape.H, inner=shape.I, gated=gated(shape))
    layer = layer_of(scaled(shape, rows), torch.bfloat16, "meta")
    return layer, tune.neighbors(getattr(start, family), ARCH, family)[: tune.MOST]


def _tiles() -> list[str]:
    found = {family: len(_walk(family)[1]) for family in _families()}
    return [f"tune/{family}/{n}" for family, count in found.items() for n in range(0, count, TOGETHER)]


def _tile(name: str) -> None:
    """Compile some tiles of a walk; a tile that the compiler refuses is refused there too."""
    from bench.aot.sass import compiled_all, job_of
    from bench.tune.stages import stage

    family, first = name.split("/")
    layer, tiles = _walk(family)
    jobs = []
    for tile in tiles[int(first) : int(first) + TOGETHER]:
        launches: list[Any] = []
        stage(layer, family, tile, launches.append)
        jobs.append(job_of(launches[-1], ARCH))
    compiled_all(jobs)


def _peers() -> list[str]:
    """List the Triton peers that tune themselves and can be imported, at the case that they are measured on."""
    return ["peers/liger/all"] if importlib.util.find_spec("liger_kernel") is not None else []


def _peer(name: str) -> None:
    """Run a peer's step with all configurations that it would time, none of them timed.

    Counts that it reads back decide grids only; they are ones here, so that what it allocates by them is small.
    """
    from triton.runtime.driver import driver

    from bench.common import peers_optional
    from bench.common.cases import Problem

    peer, case = name.split("/")
    shape = _named(CLIENT_CASES, case).shaped(STANDARD[0])
    real = functools.partial(torch.empty, dtype=torch.bfloat16)
    stacks = {"w_in": real(shape.E, shape.F, shape.H), "w_out": real(shape.E, shape.H, shape.I)}
    chosen_TK = torch.zeros(shape.T, shape.K, dtype=torch.int64)
    all_E = torch.ones(shape.E, dtype=torch.bool)
    weights_TK = torch.ones(shape.T, shape.K)
    x_TH, dy_TH = real(shape.T, shape.H), real(shape.T, shape.H)
    task = Problem(shape, _named(CLIENT_CASES, case), x_TH, dy_TH, chosen_TK, weights_TK, stacks, all_E, all_E)
    bound = peers_optional.OPTIONAL[peer]().bind(task)
    empty = torch.empty

    def ones(*size: Any, **how: Any) -> torch.Tensor:
        made = empty(*size, **how)
        return made.fill_(1) if made.dtype == torch.int32 and made.numel() < 10**6 else made

    def untimed(run: Any, quantiles: Any = None, **how: Any) -> list[float]:
        run()
        return [1.0] * len(quantiles or [0.5])

    with (
        mock.patch.object(driver.active, "get_benchmarker", return_value=untimed, create=True),
        mock.patch.object(torch, "empty", ones),
    ):
        y_TH = bound.forward(task, x_TH.requires_grad_(), weights_TK.requires_grad_())
        bound.backward(y_TH, dy_TH)


# What lists a part's pieces, and what launches one by the rest of its name; the parts of `first` before the others.
PARTS: Mapping[str, tuple[Callable[[], list[str]], Callable[[str], None]]] = MappingProxyType(
    {
        "kernels": (_kernels, _kernel),
        "correct": (_checks, _check),
        "time": (_times, _time),
        "routing": (_routers, _routed),
        "model": (_models, _modelled),
        "sanitize": (_watched, _watch),
        "tune": (_tiles, _tile),
        "peers": (_peers, _peer),
    }
)

if __name__ == "__main__":
    print(json.dumps(names(PARTS), indent=1))
