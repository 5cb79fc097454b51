"""A step of the kernels without a GPU: the drivers run on tensors without memory, and hand over what they would start.

What they allocate is counted as it comes and goes, so the peak of a step is known before there is one; and what they
would start can be compiled by many processes at once, before a measurement waits for it.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common.cases import Case, Shape
from fedmoe_kernels.gpu.experts import memory
from fedmoe_kernels.tiles.lookup import tiles_for

_BLOCK = 512  # CUDA's caching allocator counts in these


@dataclass(frozen=True)
class Sizes:
    """Bytes of one step above weights, x and dy: `kept` between the passes with y, `peak` the most at once."""

    kept: int
    peak: int


class Allocations(TorchDispatchMode):
    """Counts the bytes of new storage while it is on; what existed before is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def predicted(shape: Shape, case: Case, arch: str, *, dtype: torch.dtype, recompute: bool = False) -> Sizes:
    """Predict `sizes_of` in closed form, as a cost model has it, with room for the allocator to round 24 blocks up.

    Of the routing a row keeps its place's row (8 bytes), weight (4) and whether it is not 0 (1); the forward has its
    token, place, expert and slot too (8 each).
    """
    shape = case.shaped(shape)
    held, gated = case.held(shape), shape.F == 2 * shape.I
    per_slot = max(1, shape.T * shape.K // held)
    tiles = tiles_for(arch, dtype, per_slot, hidden=shape.H, inner=shape.I, gated=gated)
    sizes = memory.CallSizes(
        *(shape.T, shape.K, shape.H, shape.I, held, gated, tiles),
        learning=case.learning(shape),
        itemsize=dtype.itemsize,
    )
    record = 13 * sizes.rows + 8 * (held + 1) + 24 * _BLOCK
    z = 0 if recompute else sizes.by_row(sizes.width)
    kept = record + z + dtype.itemsize * shape.T * shape.H
    forward = record + 32 * sizes.rows + memory.forward_bytes(sizes, keep_z=not recompute)
    biases = dtype.itemsize * case.learning(shape) * (shape.F + shape.H) if shape.bias else 0
    backward = memory.backward_bytes(sizes, recompute=recompute, scores=False) + biases
    return Sizes(kept, max(forward, kept + backward))


def sizes_of(shape: Shape, case: Case, arch: str, **how: Any) -> Sizes:
    """Return what a step allocates; arguments as of `dry_step`."""
    with Allocations() as count:
        y_TH, backward = dry_step(shape, case, arch, _drop, **how)
        kept = count.live
        grads = backward()
        peak = count.peak
    del y_TH, grads
    return Sizes(kept, peak)


def launches_of(shape: Shape, case: Case, arch: str, **how: Any) -> list[Any]:
    """Return what a step starts, `gpu.launch.Launch` records in their order; arguments as of `dry_step`."""
    found: list[Any] = []
    _, backward = dry_step(shape, case, arch, found.append, **how)
    backward()
    return found


def _drop(launch: Any) -> None:
    """Drop a record: kept, it would keep what it was to write."""


def dry_step(
    shape: Shape,
    case: Case,
    arch: str,
    execute: Callable[[Any], None],
    *,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
    device: str = "meta",
) -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
    """Run the contender `fedmoe`'s forward without a GPU; return y and its backward; no adapters, no scores.

    Args:
        shape, case: as measured; shapes are all that the drivers see, so it does not matter where the rows go.
        arch: a key of the tile tables.
        execute: what becomes of each launch.
        dtype: of everything but the routing weights.
        recompute: keep no z.
        device: where the tensors lie; on "cpu" they have addresses, and take memory once something writes to them.
    """
    from bench.aot import cases  # needs triton, which not every machine has, as do both below
    from fedmoe_kernels.gpu.experts import driver as experts
    from fedmoe_kernels.gpu.routing import driver as routing

    shape = case.shaped(shape)
    sizes = (shape.T, shape.H, shape.I, case.held(shape), shape.K, case.learning(shape))
    layer = cases.Case(shape.name, *sizes, shape.activation, shape.bias, dtype)
    # From outside the count: weights, x and dy are there before the step.
    with torch.utils._python_dispatch._disable_current_modes():
        inputs = cases.inputs_of(layer, device)
        dy_TH = torch.empty_like(inputs.x_TH)
        ids = {"dtype": torch.int64, "device": device}
        chosen_TK, table_CE = torch.empty(shape.T, shape.K, **ids), torch.empty(1, shape.E, **ids)
    needs = [*cases.needs_of(layer)[:-1], False]
    how = {"activation": shape.activation, "rows_per_slot": layer.rows_per_slot, "arch": arch}
    placed = routing.place(chosen_TK, routing.Holders(table_CE, None, None), num_slots=layer.B, execute=execute)
    mask_TK = placed[1] >= 0  # kept for the backward of the line below; the rest of the record goes with the forward
    index = dict(zip(("rows_TK", "tokens_R", "places_R", "offsets_B1"), placed[2:], strict=True))
    inputs = inputs._replace(weights_TK=inputs.weights_TK.where(mask_TK, 0.0), **index)
    y_TH, z_RF, _ = experts.forward(inputs, keep_z=not recompute, execute=execute, **how)
    inputs = inputs.kept
    del placed, index

    def backward() -> tuple[Tensor, ...]:
        grads = experts.backward(dy_TH, z_RF, inputs, needs=needs, execute=execute, **how)
        return *grads, mask_TK

    return y_TH, backward


def warm(cases: Sequence[tuple[Shape, Case]], jobs: int, arch: str) -> int:
    """Compile what steps of these cases start, z kept and made again, into Triton's cache on disk; how many kernels.

    Each different piece of code is one task, so that `jobs` processes share the work whatever the cases are.
    """
    from bench.aot.sass import code_of, job_of  # needs triton

    found: dict[Any, None] = {}
    for shape, case in cases:
        for recompute in (False, True):
            started = launches_of(shape, case, arch, recompute=recompute)
            found |= dict.fromkeys(job_of(launch, arch) for launch in started if 0 not in launch.grid)
    # A forked process would share a CUDA context that it cannot use.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(jobs, len(found))), mp_context=context) as pool:
        failed = [code.error for code in pool.map(code_of, found) if code.error]
    for error in failed:
        print(f"does not compile: {error}", flush=True)
    return len(found) - len(failed)
