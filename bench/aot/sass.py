"""One Launch compiled for a GPU that is not there, and what its machine code says: registers, spills, instructions.

A launch is turned into a `Job` by the same code that Triton runs when a kernel is called (its binder and its packing
of arguments). So a job is what a GPU of that architecture would compile: pointers and numbers divisible by 16 are
known to be, a 1 is a constant. A job holds plain data only and can be sent to another process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import create_function_from_signature

from bench.aot.listing import PRODUCTS, Listing, instructions, listings, usage
from fedmoe_kernels.gpu.launch import Launch
from fedmoe_kernels.tiles.lookup import SHARED, arch_of_capability

# What kernels are compiled for: each architecture that has a table, and those served by another's, see `table_of`.
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
BATCH = 8  # jobs that a worker takes at a time


def table_of(arch: str) -> str:
    """Name the tiles' table that serves GPUs of `arch`: "sm_89" and "sm_120" have that of "sm_86"."""
    return arch_of_capability(*divmod(int(arch.removeprefix("sm_")), 10))


def target_of(arch: str) -> GPUTarget:
    """The compiler's name of "sm_90" and its like."""
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Job:
    """What decides the machine code of a launch; two launches with equal jobs share one.

    Attributes:
        module, kernel: where the kernel is found.
        signature: (name, type) of the parameters in order; types as "*bf16", "i32", "constexpr",
            "tensordesc<bf16[1, 128, 64]>".
        constants: (place, value) of the constants, ones among the numbers included.
        attributes: (place, divisible by 16) of every parameter that Triton's own record has, a False included: Triton
            has an empty one for a constant string, and it is a part of the key under which machine code is cached.
        limit: on the registers of a thread, 0 = none.
    """

    arch: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], bool], ...]
    warps: int
    stages: int
    limit: int = 0

    @property
    def options(self) -> dict[str, int]:
        """As `Launch.options`."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.limit} if self.limit else options

    @property
    def aligned(self) -> tuple[tuple[int, ...], ...]:
        """Places of the parameters known to be divisible by 16."""
        return tuple(place for place, divisible in self.attributes if divisible)

    def source(self) -> ASTSource:
        """What Triton compiles: the very one that a call of the kernel would hand to the compiler."""
        return ASTSource(
            fn=getattr(importlib.import_module(self.module), self.kernel),
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            attrs={place: [["tt.divisibility", 16]] if divisible else [] for place, divisible in self.attributes},
        )

    def key(self) -> str:
        """Compute the name of this job's folder in Triton's cache; equal to that of a call of the kernel."""
        backend = make_backend(target_of(self.arch))
        whole = (self.source(), backend, backend.parse_options(self.options), get_cache_invalidating_env_vars())
        return hashlib.sha256(get_cache_key(*whole).encode()).hexdigest()

    def constant(self, name: str) -> Any:
        """The value of the constant parameter `name`, None where there is none."""
        names = [parameter for parameter, _ in self.signature]
        return dict(self.constants).get((names.index(name),)) if name in names else None

    def parts(self) -> dict[str, str]:
        """Everything that decides, by the name of the parameter, to tell two jobs of a kernel apart."""
        constants, aligned = dict(self.constants), set(self.aligned)
        named = {
            name: f"{kind}{' 16' if (i,) in aligned else ''}{f' = {constants[(i,)]!r}' if (i,) in constants else ''}"
            for i, (name, kind) in enumerate(self.signature)
        }
        return named | {name: str(value) for name, value in self.options.items()}


# Instructions of the loop around products of warp groups, at most. In a weight gradient's step a scheduler's two warps
# issue theirs within 1024 cycles of the tensor cores; in the others' within 512 to 1024. Where codes are decoded in the
# loop, 32 of a thread's a step, 64 with few rows: 7 instructions an integer, 11 a small float, 24 a level of nf4.
_DECODING = {
    "integers": 280,
    "integers, few rows": 540,
    "floats": 430,
    "floats, few rows": 760,
    "levels": 880,
    "levels, few rows": 1700,
}
_DECODED = {"int8": "integers", "int4": "integers", "nf4": "levels"}
MOST_IN_LOOP = {
    "sm_90": {"weight gradient": 190, "wide": 118, "narrow": 140, **_DECODING},
    "sm_100": {"weight gradient": 260, "wide": 132, "narrow": 150, **_DECODING},
}
# Programs an SM that a tile was chosen for (tiles/static.py), by architecture, kernel and rows x columns of a block.
PROMISED = {
    ("sm_90", "_data_gradient_kernel", 128, 128): 2,
    ("sm_90", "_data_gradient_kernel", 64, 128): 2,
    ("sm_90", "_rows_kernel", 64, 128): 2,
    ("sm_90", "_up_kernel", 64, 64): 2,
}


class Dot(NamedTuple):
    """A product in a kernel: (m, k) @ (k, n) of `dtype`; `precision` is of float32; `looped` = streams its operands."""

    m: int
    n: int
    k: int
    dtype: str
    precision: str
    looped: bool

    def instruction(self, arch: str) -> str | None:
        """What `arch` has for it: warp-group products from 64 rows, a warp's own below; None = no tensor core."""
        if self.dtype == "f32" and self.precision == "ieee":
            return None
        return {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(arch, "HMMA") if self.m >= 64 else "HMMA"


@dataclass(frozen=True)
class Code:
    """What one job compiled to.

    Attributes:
        registers: of a thread; 255 is the most there are.
        stack: bytes of a thread's own memory, 0 unless something spilled.
        shared: bytes of shared memory of a program.
        listing: what its instructions are.
        dots: every product in the kernel's first form.
        waiting: two-dimensional loads by address in a loop that the pipeliner did not fetch ahead.
        seconds: the compilation took.
        error: what the compiler said where it failed; everything else is then 0.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    listing: Listing = field(default_factory=Listing)
    dots: tuple[Dot, ...] = ()
    waiting: int = 0
    seconds: float = 0.0
    error: str = ""

    def resident(self, job: Job) -> int:
        """Programs that fit an SM at once: by 64 K registers, warps, and shared memory with 1 KB of overhead."""
        if self.error:
            return 0
        registers = 8 * -(-max(self.registers, 1) // 8)
        table = table_of(job.arch)
        shared, warps = SHARED[table] + 1024, 48 if table == "sm_86" else 64
        return min(65536 // (registers * 32 * job.warps), shared // (self.shared + 1024), warps // job.warps)


def job_of(launch: Launch, arch: str) -> Job:
    """The job of `launch` on `arch`; its tensors may be on "meta", for only types and alignment are read."""
    kernel = launch.kernel
    backend = make_backend(target_of(arch))
    options = launch.options
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(**launch.args, **options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, {**launch.args, **options}, bound, specialization, extra
    )
    assert all(value in ([], [["tt.divisibility", 16]]) for value in attributes.values()), attributes
    return Job(
        arch,
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((place, bool(value)) for place, value in attributes.items()),
        launch.warps,
        launch.stages,
        launch.registers,
    )


def compiled(job: Job) -> Code:
    """Compile and read the code; a compiler's error becomes the record's, so that a table can show it."""
    return compiled_all([job])[0]


def code_of(job: Job) -> Code:
    """Compile, or take from the cache, and read all of the code but its instructions: the disassembler is slow."""
    return _built(job)[0]


def compiled_all(jobs: Sequence[Job]) -> list[Code]:
    """Compile every job as `compiled` does, in order.

    The disassembler needs 0.3 s to start and little more to read a kernel, so it starts once for each architecture.
    """
    found = [_built(job) for job in jobs]
    for arch in sorted({job.arch for job in jobs}):
        places = [place for place, job in enumerate(jobs) if job.arch == arch and not found[place][0].error]
        for place, listing in zip(places, listings(target_of(arch).arch, [found[p][1] for p in places]), strict=True):
            found[place] = (replace(found[place][0], listing=listing), b"")
    return [code for code, _ in found]


def compiled_by(pool: Executor, jobs: Sequence[Job]) -> Iterator[Code]:
    """The code of every job, in order, compiled by the workers of `pool`."""
    batches = [jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH)]
    return itertools.chain.from_iterable(pool.map(compiled_all, batches))


def built(job: Job) -> Any:
    """Compile a job; what Triton makes of it, with every form in `asm`."""
    # Where ptxas refuses, Triton prints all of its input: thousands of lines a tile.
    with contextlib.redirect_stdout(io.StringIO()):
        return triton.compile(job.source(), target=target_of(job.arch), options=job.options)


def _built(job: Job) -> tuple[Code, bytes]:
    """All of the code's record but its listing, and the instructions."""
    start = time.perf_counter()
    try:
        made = built(job)
    except Exception as error:
        return Code(error=_reason(error)), b""
    registers, stack = usage(made.asm["cubin"])
    code = Code(
        registers=registers,
        stack=stack,
        shared=made.metadata.shared,
        dots=tuple(_dots(made.asm["ttir"])),
        waiting=waiting(made.asm["ttgir"]),
        seconds=time.perf_counter() - start,
    )
    return code, instructions(made.asm["cubin"])


def misses(job: Job, code: Code) -> list[str]:
    """What a row of the table falls short of, each in a few words; empty = it passes."""
    if code.error:
        return [code.error]
    listing, found = code.listing, []
    count, shared = listing.opcodes, SHARED[table_of(job.arch)]
    if (code.stack or count["STL"] or count["LDL"]) and not _spills_little(job, code):
        found.append(f"spills {code.stack} bytes")
    if code.shared > shared:
        found.append(f"{code.shared} bytes of shared memory, {shared} are there")
    wanted = {dot.instruction(job.arch) for dot in code.dots} - {None}
    for name in PRODUCTS:
        if name in wanted and not count[name]:
            found.append(f"no {name}")
        if name not in wanted and count[name]:
            found.append(f"{name} where none is expected")
    if {"HGMMA", "UTCHMMA"} & wanted and listing.loop > (most := _most_in_loop(job)):
        found.append(f"{listing.loop} instructions in the loop of products, {most} at most")
    if code.resident(job) < (least := _promised(job)):
        found.append(f"{code.resident(job)} programs an SM, {least} were counted on")
    if listing.left_in_registers:
        found.append(f"{listing.left_in_registers} HGMMA with the left operand in registers")
    if any(dot.looped for dot in code.dots) and not count["LDGSTS"] + count["UTMALDG"]:
        found.append("operands pass through registers: neither LDGSTS nor UTMALDG")
    if code.waiting and any(dot.looped for dot in code.dots):
        found.append(f"{code.waiting} loads of blocks in a loop are not fetched ahead")
    if job.kernel == "_persistent_kernel" and listing.loads_before_stores is not True:
        found.append("the next tile's operands do not arrive while a tile is stored")
    if any(kind.startswith("tensordesc") for _, kind in job.signature) and not count["UTMALDG"]:
        found.append("takes descriptors, but has no UTMALDG")
    if count["ATOMG"]:
        found.append("atomics")
    return found


def _most_in_loop(job: Job) -> int:
    """The instructions that the loop of products may have, see `MOST_IN_LOOP`."""
    if job.kernel == "_weight_gradient_kernel":
        kind = "weight gradient"
    elif job.constant("FORMAT"):
        few = "" if job.constant("BM") >= 64 else ", few rows"
        kind = _DECODED.get(job.constant("FORMAT"), "floats") + few
    else:
        kind = "wide" if (job.constant("BN") or 0) >= 128 else "narrow"
    return MOST_IN_LOOP[job.arch][kind]


def _promised(job: Job) -> int:
    """How many programs must fit an SM, see `PROMISED`; 1 where nothing is said."""
    block = tuple(job.constant(long) or job.constant(short) for long, short in (("BM", "BP"), ("BN", "BQ")))
    return PROMISED.get((job.arch, job.kernel, *block), 1)


def _spills_little(job: Job, code: Code) -> bool:
    """Whether what spills is little, and outside the loop: 64 bytes where registers are limited, 16 beside codes.

    64 bytes are 16 stores and as many loads of a thread, beside the 4,700 instructions of 45 steps.
    """
    listing, most = code.listing, 64 if job.limit else 16 if job.constant("FORMAT") else 0
    return listing.loop > 0 and not listing.loop_spills and code.stack <= most


def _reason(error: BaseException) -> str:
    """The innermost of a chain of compiler errors, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(getattr(error, "error_message", None) or error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _dots(ttir: str) -> list[Dot]:
    looped = set(_in_loops(ttir, r"tt\.dot "))
    form = re.compile(
        r"tt\.dot [^\n]*?(?:inputPrecision = (\w+)[^\n]*?)?: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x"
    )
    dots = []
    for number, line in enumerate(ttir.splitlines()):
        for how, m, k, kind, n in form.findall(line):
            dots.append(Dot(int(m), int(n), int(k), kind, how or "ieee", number in looped))
    return dots


def waiting(ttgir: str) -> int:
    """Loads of blocks by address whose value the same turn of a loop uses; one fetched ahead goes to a later turn."""
    lines, count = ttgir.splitlines(), 0
    for number in _in_loops(ttgir, r"tt\.load .*tensor<\d+x\d+x!tt\.ptr"):
        name = re.escape(lines[number].split("=")[0].strip())
        used = (line for line in lines[number + 1 :] if "scf.yield" not in line)
        count += any(re.search(rf"{name}\b(?!_)", line) for line in used)
    return count


def _in_loops(text: str, pattern: str) -> list[int]:
    """Numbers of the lines inside a loop that match."""
    found, depth, loops = [], 0, []
    for number, line in enumerate(text.splitlines()):
        if loops and re.search(pattern, line):
            found.append(number)
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1] and "}" in line:
            loops.pop()
    return found
