"""One Launch compiled for a GPU that is not there, and what its machine code says: registers, spills, instructions.

A launch is turned into a `Job` by the same code that Triton runs when a kernel is called (its binder and its packing
of arguments). So a job is what a GPU of that architecture would compile: pointers and numbers divisible by 16 are
known to be, a 1 is a constant. A job holds plain data only and can be sent to another process.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import importlib
import io
import itertools
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import create_function_from_signature

from fedmoe_kernels.configs import SHARED
from fedmoe_kernels.gpu.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What the table counts, by the names of the machine's own instructions.
OPCODES = {
    "HGMMA": r"\b[HQ]GMMA\b",  # Hopper's products of a whole warp group, operands in shared memory
    "UTCHMMA": r"\bUTC[HQ]MMA\b",  # Blackwell's, result in tensor memory
    "HMMA": r"\b[HQ]MMA\b",  # a warp's own product, from registers
    "LDGSTS": r"\bLDGSTS\b",  # copies from memory to shared memory past the registers
    "UTMALDG": r"\bUTMALDG\b",  # the same by tensor descriptor
    "LDG": r"\bLDG\b",  # plain loads
    "STL": r"\bSTL\b",  # spills: stores to and loads from a thread's own memory
    "LDL": r"\bLDL\b",
    "ATOMG": r"\b(?:ATOM|ATOMG|RED|REDG)\b",  # atomics on memory, in an order that nothing fixes
}
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA")
BATCH = 8  # jobs that a worker takes at a time
BYTES = 16  # of an instruction, since Volta
PROGBITS, EXECUTABLE = 1, 4  # of an ELF section: it has contents, and they can be run


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
        opcodes: how often each of `OPCODES` stands in the code.
        dots: every product in the kernel's first form.
        waiting: two-dimensional loads by address in a loop that the pipeliner did not fetch ahead.
        seconds: the compilation took.
        error: what the compiler said where it failed; everything else is then 0.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)
    dots: tuple[Dot, ...] = ()
    waiting: int = 0
    seconds: float = 0.0
    error: str = ""

    def resident(self, job: Job) -> int:
        """Programs that fit an SM at once: by 64 K registers, 64 warps, and shared memory with 1 KB of overhead."""
        if self.error:
            return 0
        registers = 8 * -(-max(self.registers, 1) // 8)
        shared = SHARED[job.arch] + 1024
        return min(65536 // (registers * 32 * job.warps), shared // (self.shared + 1024), 64 // job.warps)


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
    built = [_built(job) for job in jobs]
    for arch in sorted({job.arch for job in jobs}):
        places = [place for place, job in enumerate(jobs) if job.arch == arch and not built[place][0].error]
        listings = _disassembled(arch, [built[place][1] for place in places])
        for place, listing in zip(places, listings, strict=True):
            opcodes = {name: len(re.findall(pattern, listing)) for name, pattern in OPCODES.items()}
            built[place] = (replace(built[place][0], opcodes=opcodes), b"")
    return [code for code, _ in built]


def compiled_by(pool: Executor, jobs: Sequence[Job]) -> Iterator[Code]:
    """The code of every job, in order, compiled by the workers of `pool`."""
    batches = [jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH)]
    return itertools.chain.from_iterable(pool.map(compiled_all, batches))


def _built(job: Job) -> tuple[Code, bytes]:
    """All of the code's record but its opcodes, and the instructions."""
    start = time.perf_counter()
    try:
        # Where ptxas refuses, Triton prints all of its input: thousands of lines a tile.
        with contextlib.redirect_stdout(io.StringIO()):
            built = triton.compile(job.source(), target=target_of(job.arch), options=job.options)
    except Exception as error:
        return Code(error=_reason(error)), b""
    registers, stack = _usage(built.asm["cubin"])
    code = Code(
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        dots=tuple(_dots(built.asm["ttir"])),
        waiting=waiting(built.asm["ttgir"]),
        seconds=time.perf_counter() - start,
    )
    return code, _instructions(built.asm["cubin"])


def misses(job: Job, code: Code) -> list[str]:
    """What a row of the table falls short of, each in a few words; empty = it passes."""
    if code.error:
        return [code.error]
    count, found = code.opcodes, []
    if code.stack or count["STL"] or count["LDL"]:
        found.append(f"spills {code.stack} bytes")
    if code.shared > SHARED[job.arch]:
        found.append(f"{code.shared} bytes of shared memory, {SHARED[job.arch]} are there")
    wanted = {dot.instruction(job.arch) for dot in code.dots} - {None}
    for name in PRODUCTS:
        if name in wanted and not count[name]:
            found.append(f"no {name}")
        if name not in wanted and count[name]:
            found.append(f"{name} where none is expected")
    if any(dot.looped for dot in code.dots) and not count["LDGSTS"] + count["UTMALDG"]:
        found.append("operands pass through registers: neither LDGSTS nor UTMALDG")
    if code.waiting and any(dot.looped for dot in code.dots):
        found.append(f"{code.waiting} loads of blocks in a loop are not fetched ahead")
    if any(kind.startswith("tensordesc") for _, kind in job.signature) and not count["UTMALDG"]:
        found.append("takes descriptors, but has no UTMALDG")
    if count["ATOMG"]:
        found.append("atomics")
    return found


def _reason(error: BaseException) -> str:
    """The innermost of a chain of compiler errors, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(getattr(error, "error_message", None) or error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _run(tool: str, *options: str, data: bytes) -> str:
    """What one of the compiler's tools prints about `data`."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its own memory."""
    usage = _run("cuobjdump", "-res-usage", data=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def _instructions(cubin: bytes) -> bytes:
    """The sections of an ELF64 file that hold instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    found = b""
    for number in range(count):
        _, kind, flags, _, start, length = struct.unpack_from("<IIQQQQ", cubin, table + number * size)
        if kind == PROGBITS and flags & EXECUTABLE:
            found += cubin[start : start + length]
    assert found, "no instructions in the program"
    return found


def _disassembled(arch: str, programs: list[bytes]) -> list[str]:
    """The listing of each program, from one start of the disassembler over all of them."""
    name = sm_arch_from_capability(target_of(arch).arch).replace("sm_", "SM")  # "SM80", "SM90a"
    text = _run("nvdisasm", "--binary", name, data=b"".join(programs)) if programs else ""
    lines = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(.*)$", text, re.MULTILINE)
    ends = list(itertools.accumulate(map(len, programs)))
    parts: list[list[str]] = [[] for _ in programs]
    for address, line in lines:
        parts[bisect.bisect_right(ends, int(address, 16))].append(line)
    for program, part in zip(programs, parts, strict=True):
        assert len(part) == len(program) // BYTES, "the disassembler left instructions out"
    return ["\n".join(part) for part in parts]


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
