"""One Launch compiled for a GPU that is not there, and what its machine code says: registers, spills, instructions.

A launch is turned into a `Job` by the same code that Triton runs when a kernel is called (its binder and its packing
of arguments), so a job is what a GPU of that architecture would compile: pointers and numbers divisible by 16 are
known to be, a 1 is a constant. A job holds plain data only and can be sent to another process.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fedmoe_kernels.gpu.launch import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What the table counts, by the names of the machine's own instructions.
OPCODES = {
    "HGMMA": r"\b[HQ]GMMA",  # Hopper's products of whole warp groups, operands in shared memory
    "UTCMMA": r"\bUTC[HQ]MMA",  # Blackwell's, result in tensor memory
    "HMMA": r"\b[HQ]MMA",  # a warp's own product, from registers
    "LDGSTS": r"\bLDGSTS",  # copies from memory to shared memory without registers
    "UTMALDG": r"\bUTMALDG",  # the same by tensor descriptor
    "LDG": r"\bLDG\b",  # plain loads
    "STL": r"\bSTL\b",  # spills: stores to and loads from a thread's own memory
    "LDL": r"\bLDL\b",
    "ATOM": r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG|UREDG|REDAS)\b",
}


def target_of(arch: str) -> GPUTarget:
    """The compiler's name of "sm_90" and its like."""
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@dataclass(frozen=True)
class Job:
    """What decides the machine code of a launch; two launches with equal jobs share one.

    Attributes:
        module, kernel: where the kernel is found.
        signature: types of the parameters in order, as in "*bf16", "i32", "tensordesc<bf16[1,128,64]>", "constexpr".
        constants: (position, value) of the constants, ones among the numbers included.
        aligned: positions of the parameters known to be divisible by 16.
    """

    arch: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[tuple[int, ...], str], ...]
    warps: int
    stages: int

    def constant(self, name: str) -> Any:
        """The value of the constant parameter `name`, None where it has none of that name."""
        names = [parameter for parameter, _ in self.signature]
        return dict(self.constants).get((names.index(name),)) if name in names else None


@dataclass(frozen=True)
class Code:
    """What one job compiled to.

    Attributes:
        registers: of a thread; 255 is the most there are.
        stack: bytes of a thread's own memory, 0 unless something spilled.
        shared: bytes of shared memory of a program.
        opcodes: how often each of `OPCODES` stands in the code.
        dots: (M, N, K, dtype, precision) of every product in the kernel's source form.
        waiting: two-dimensional loads by address left in a loop, not fetched ahead by the pipeliner.
        seconds: the compilation took.
        error: what the compiler said where it failed; everything else is then 0.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)
    dots: tuple[tuple[int, int, int, str, str], ...] = ()
    waiting: int = 0
    seconds: float = 0.0
    error: str = ""


def job_of(launch: Launch, arch: str) -> Job:
    """The job of `launch` on `arch`; its tensors may be on "meta", for only types and alignment are read."""
    kernel = launch.kernel
    backend = make_backend(target_of(arch))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(**launch.args, **options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, {**launch.args, **options}, bound, specialization, extra
    )
    return Job(
        arch,
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((place, str(value)) for place, value in attributes.items() if value),
        launch.warps,
        launch.stages,
    )


def compiled(job: Job) -> Code:
    """Compile and read the code; a compiler's error becomes the record's, so that a table can show it."""
    start = time.perf_counter()
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(job.signature),
        constexprs=dict(job.constants),
        attrs={place: [["tt.divisibility", 16]] for place, _ in job.aligned},
    )
    options = {"num_warps": job.warps, "num_stages": job.stages}
    try:
        built = triton.compile(source, target=target_of(job.arch), options=options)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Code(error=f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300])
    usage, listing = _dump(built.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Code(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=built.metadata.shared,
        opcodes={name: len(re.findall(pattern, listing)) for name, pattern in OPCODES.items()},
        dots=dots(built.asm["ttir"]),
        waiting=waiting(built.asm["ttgir"]),
        seconds=time.perf_counter() - start,
    )


def _dump(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        both = [
            subprocess.run([str(TOOLS / "cuobjdump"), flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        ]
    return both[0].stdout + both[0].stderr, both[1].stdout


def dots(ttir: str) -> tuple[tuple[int, int, int, str, str], ...]:
    """(M, N, K, dtype, precision) of each tt.dot."""
    form = r"tt\.dot [^\n]*?(?:inputPrecision = (\w+)[^\n]*?)?: tensor<(\d+)x(\d+)x(\w+)[^\n]*?\* tensor<\d+x(\d+)x"
    return tuple((int(m), int(n), int(k), kind, how) for how, m, k, kind, n in re.findall(form, ttir))


def waiting(ttgir: str) -> int:
    """Loads of a block by address that are still plain loads inside a loop."""
    count, depth, loops = 0, 0, []
    for line in ttgir.splitlines():
        if "scf.for" in line or "scf.while" in line:
            loops.append(depth)
        if loops and re.search(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr", line):
            count += 1
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1] and "}" in line:
            loops.pop()
    return count
