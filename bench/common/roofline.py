"""What a layer must cost on a GPU: products, bytes and the least time of every stage in closed form, and a prediction.

The least time of a stage is the longer of its products at the GPU's peak and its bytes at the memory's peak; stages
follow one another, so that a pass is the sum. `expected` adds what a tiled kernel loses on the way; its constants are
assumptions until a GPU has confirmed them.

Letters: T tokens, K top-k, R = T * K rows, B slots, Bt trainable slots, Rt rows on them, H hidden, I intermediate,
F = 2 * I if gated else I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU, dense bfloat16 with float32 sums, from the maker's data sheet.

    Attributes:
        arch: which tables its kernels use.
        tflops: products and additions, 10^12 / s.
        tbytes: memory, 10^12 bytes / s.
        sms: streaming multiprocessors.
        per_cycle: products and additions of one's tensor cores in a cycle.
        reached: share of `tflops` that the inner loop of a Triton kernel keeps up when nothing else is in the way.
        l2_tbytes: what the L2 cache hands to the SMs, 10^12 bytes / s.

    `reached` and `l2_tbytes` are assumptions, no data sheet has them; they only enter `expected`.
    """

    name: str
    arch: str
    tflops: float
    tbytes: float
    sms: int
    per_cycle: int
    reached: float
    l2_tbytes: float
    source: str

    @property
    def hertz(self) -> float:
        """Cycles a second at which `tflops` is counted."""
        return self.tflops * 1e12 / self.sms / self.per_cycle


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 312.0, 2.039, 108, 2048, 0.72, 5.0, "NVIDIA A100 data sheet, 80 GB SXM"),
        Gpu("H100", "sm_90", 989.4, 3.35, 132, 4096, 0.66, 7.0, "NVIDIA H100 data sheet, SXM, half of the sparse rate"),
        Gpu("H200", "sm_90", 989.4, 4.8, 132, 4096, 0.66, 7.0, "NVIDIA H200 data sheet, SXM, half of the sparse rate"),
        Gpu(
            "B200",
            "sm_100",
            2250.0,
            8.0,
            148,
            8192,
            0.55,
            12.0,
            "NVIDIA DGX B200 data sheet, an eighth, half of the sparse rate",
        ),
    )
}
FASTEST_MEMORY = 0.90  # share of the memory's peak that long streams reach on these GPUs
START_SECONDS = 2.0e-6  # from the end of one kernel to the first useful load of the next, launches queued ahead
IDLE_SECONDS = 0.7e-6  # of a program that finds no work: to start it, and to read its tile and its slot
FILL_SECONDS = 1.0e-6  # of a program: until its first stage has arrived, while its share of the tensor cores idles


@dataclass(frozen=True)
class Layer:
    """One layer as one client runs it: T tokens, K experts each, B slots of which Bt learn, on rows drawn uniformly.

    Attributes:
        share: of the rows that are on trainable slots; None = Bt / B.
        itemsize: bytes of an element.
    """

    T: int
    H: int
    I: int  # noqa: E741 - the house's letter for the intermediate size
    B: int
    K: int
    Bt: int | None = None
    gated: bool = True
    share: float | None = None
    itemsize: int = 2

    @property
    def rows(self) -> int:
        """R; every place holds a row."""
        return self.T * self.K

    @property
    def wide(self) -> int:
        """F."""
        return 2 * self.I if self.gated else self.I

    @property
    def trainable(self) -> int:
        """Bt."""
        return self.B if self.Bt is None else self.Bt

    @property
    def trainable_rows(self) -> int:
        """Rt."""
        share = self.trainable / self.B if self.share is None else self.share
        return round(self.rows * share)

    @property
    def kept_bytes(self) -> int:
        """What the forward keeps for the backward: x, z and 16 bytes of indices a row."""
        return self.itemsize * (self.T * self.H + self.rows * self.wide) + 16 * self.rows


@dataclass(frozen=True)
class Work:
    """One stage's floating-point operations and the least bytes it must move."""

    stage: str
    flops: int
    bytes: int

    def seconds(self, gpu: Gpu) -> float:
        """Return the least time there is."""
        return max(self.flops / (gpu.tflops * 1e12), self.bytes / (gpu.tbytes * 1e12))


def forward(layer: Layer) -> tuple[Work, ...]:
    """List the stages of the forward pass; each reads its weights and rows once and writes its result once."""
    t, h, i, b, r, f, s = _letters(layer)
    return (
        Work("up", 2 * r * h * f, s * (t * h + b * f * h + r * f + r * i)),
        Work("down", 2 * r * i * h, s * (r * i + b * h * i + r * h)),
        Work("combine", 2 * r * h, s * (r * h + t * h)),
    )


def backward(layer: Layer, *, block: int = 128) -> tuple[Work, ...]:
    """List the stages of the backward pass; `block` is the width of the data gradient's blocks (its partial sums)."""
    t, h, i, b, r, f, s = _letters(layer)
    bt, rt = layer.trainable, layer.trainable_rows
    partials = 4 * r * math.ceil(i / block)
    stages = [
        Work("data_gradient", 2 * r * h * i, s * (t * h + b * h * i + 2 * r * f + r * i) + partials),
        Work("input_gradient", 2 * r * f * h, s * (r * f + b * f * h + r * h)),
        Work("combine_gradient", r * h, s * (r * h + t * h)),
    ]
    if bt:
        stages += [
            Work("w_out_gradient", 2 * rt * i * h, s * (t * h + rt * i + bt * h * i)),
            Work("w_in_gradient", 2 * rt * f * h, s * (t * h + rt * f + bt * f * h)),
        ]
    return tuple(stages)


def least_seconds(stages: tuple[Work, ...], gpu: Gpu) -> float:
    """Return the roofline of a pass: no schedule of these stages, one after another, can be faster."""
    return sum(work.seconds(gpu) for work in stages)


def _letters(layer: Layer) -> tuple[int, int, int, int, int, int, int]:
    return layer.T, layer.H, layer.I, layer.B, layer.rows, layer.wide, layer.itemsize


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work, for a prediction.

    Attributes:
        programs: that have something to do.
        resident: programs that fit an SM at once.
        useful: share of the computed products that is asked for; the rest is the edges of tiles.
        streamed: bytes of operands that a program takes from the L2 cache.
        stored: bytes that it writes when its products are done.
        ahead: whether the next program's operands arrive while it writes, so that only the first pipeline fills idle.
        idle: programs besides that find no work.
        issued: instructions that each of an SM's four schedulers issues for one program, one a cycle at most.
    """

    programs: float
    resident: int = 1
    useful: float = 1.0
    streamed: float = 0.0
    stored: int = 0
    ahead: bool = False
    idle: float = 0.0
    issued: float = 0.0


def expected(work: Work, gpu: Gpu, tiling: Tiling) -> float:
    """Predict the seconds of one launch: the slowest of products, instructions, operands' way through L2 and memory.

    The programs come in waves of `resident * sms`. A program's share of the tensor cores idles while its pipeline
    fills and its result drains, unless another one on the same SM fills the gap: then 1 / resident of that time shows.
    """
    memory = work.bytes / (gpu.tbytes * 1e12 * FASTEST_MEMORY)
    if not work.flops or not tiling.programs:
        return memory + START_SECONDS
    waves = math.ceil(tiling.programs / (tiling.resident * gpu.sms))
    products = work.flops / tiling.useful / tiling.programs / (gpu.tflops * 1e12 * gpu.reached / gpu.sms)
    operands = tiling.streamed / (gpu.l2_tbytes * 1e12 / gpu.sms)
    drain = tiling.stored / (gpu.l2_tbytes * 1e12 / gpu.sms)
    fill = FILL_SECONDS / tiling.resident
    least = max(products, operands, tiling.issued / gpu.hertz)
    busy = least * tiling.resident + drain / tiling.resident + (0 if tiling.ahead else fill)
    idle = tiling.idle * IDLE_SECONDS / (tiling.resident * gpu.sms)
    return max(waves * busy + (fill if tiling.ahead else 0), memory) + idle + START_SECONDS
