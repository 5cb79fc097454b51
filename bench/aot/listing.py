"""What a program's machine code says: the instructions of each kind, and of the loop that holds its products."""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import sm_arch_from_capability

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
BYTES = 16  # of an instruction, since Volta
PROGBITS, EXECUTABLE = 1, 4  # of an ELF section: it has contents, and they can be run

_BACK = re.compile(r"\bBRA(?:\.\S+)?\s+(?:!?U?P\d+,\s*)?0x([0-9a-f]+)")
_ALWAYS = re.compile(r"^BRA(?:\.\S+)?\s+0x")
_STORE = re.compile(r"\bSTG\b")
_COPY = re.compile(r"\b(?:UTMALDG|LDGSTS)\b")
_PRODUCT = re.compile("|".join(OPCODES[name] for name in PRODUCTS))
_SPILL = re.compile(rf"{OPCODES['STL']}|{OPCODES['LDL']}")
# The operand after the sums is the left one: a register, where the others have a descriptor of shared memory.
_LEFT_IN_REGISTERS = re.compile(r"\b[HQ]GMMA\S*\s+R\d+,\s*R\d+,")


@dataclass(frozen=True)
class Listing:
    """What one program's instructions are.

    Attributes:
        opcodes: how often each of `OPCODES` stands in it.
        loop: instructions of the shortest loop that has a product in it; 0 = none has. Where a loop also stores, which
            is one over tiles and steps, those of a step that neither begins nor ends a tile.
        loop_spills: of those, the ones that store to or load from a thread's own memory.
        loads_before_stores: whether the loop's copies to shared memory stand before its stores; None = it has none.
        left_in_registers: products of warp groups whose left operand is in registers. ptxas before 13.3 can overwrite
            them while they are read (triton issue 11781).
    """

    opcodes: dict[str, int] = field(default_factory=dict)
    loop: int = 0
    loop_spills: int = 0
    loads_before_stores: bool | None = None
    left_in_registers: int = 0


def listings(capability: int, programs: Sequence[bytes]) -> list[Listing]:
    """Read every program for GPUs of `capability` (90, 100), given as `instructions` returns it.

    The disassembler needs 0.3 s to start and little more to read a kernel, so it starts once for all of them.
    """
    return [read(lines) for lines in _disassembled(capability, programs)]


def read(lines: Sequence[str]) -> Listing:
    """Read one program's instructions, 16 bytes each, with branches to byte addresses from its start."""
    text = "\n".join(lines)
    loop = _product_loop(lines)
    body = [lines[number] for number in loop]
    stores = [place for place, line in enumerate(body) if _STORE.search(line)]
    loads = [place for place, line in enumerate(body) if _COPY.search(line)]
    return Listing(
        {name: len(re.findall(pattern, text)) for name, pattern in OPCODES.items()},
        _shortest_way(lines, loop) if stores else len(body),
        sum(1 for line in body if _SPILL.search(line)),
        loads[-1] < stores[0] if loads and stores else None,
        len(_LEFT_IN_REGISTERS.findall(text)),
    )


def _product_loop(lines: Sequence[str]) -> range:
    """Where the shortest run of instructions is that a jump back repeats and that has a product in it.

    One that jumps back on a condition, if there is any: the assembler puts what waits for a barrier behind the program,
    from where it jumps back always.
    """
    loops = []
    for number, line in enumerate(lines):
        target = _BACK.search(line)
        first = int(target[1], 16) // BYTES if target else number + 1
        if first < number and any(map(_PRODUCT.search, lines[first : number + 1])):
            loops.append((_ALWAYS.search(line) is not None, number + 1 - first, range(first, number + 1)))
    return min(loops, key=lambda loop: loop[:2])[2] if loops else range(0)


def _shortest_way(lines: Sequence[str], loop: range) -> int:
    """Count the instructions from the loop's first to its last one where every jump ahead that skips more is taken."""
    counts = {loop.start: 1}
    for number in loop:
        target = _BACK.search(lines[number])
        ahead = [] if _ALWAYS.search(lines[number]) else [number + 1]
        ahead += [int(target[1], 16) // BYTES] if target else []
        for place in ahead:
            if number in counts and number < place <= loop[-1]:
                counts[place] = min(counts.get(place, len(lines)), counts[number] + 1)
    return counts[loop[-1]]


def instructions(cubin: bytes) -> bytes:
    """Return the sections of an ELF64 file that hold instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    found = b""
    for number in range(count):
        _, kind, flags, _, start, length = struct.unpack_from("<IIQQQQ", cubin, table + number * size)
        if kind == PROGBITS and flags & EXECUTABLE:
            found += cubin[start : start + length]
    assert found, "no instructions in the program"
    return found


def usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of its own memory."""
    said = tool("cuobjdump", "-res-usage", data=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def tool(name: str, *options: str, data: bytes) -> str:
    """Return what one of the compiler's tools prints about `data`."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _disassembled(capability: int, programs: Sequence[bytes]) -> list[list[str]]:
    """The lines of each program, branches counted from its own start."""
    name = sm_arch_from_capability(capability).replace("sm_", "SM")  # "SM80", "SM90a"
    text = tool("nvdisasm", "--binary", name, data=b"".join(programs)) if programs else ""
    ends = list(itertools.accumulate(map(len, programs)))
    parts: list[list[str]] = [[] for _ in programs]
    for address, line in re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(.*)$", text, re.MULTILINE):
        place = bisect.bisect_right(ends, int(address, 16))
        start = ends[place] - len(programs[place])
        parts[place].append(_BACK.sub(lambda jump, start=start: _from(jump, start), line))
    for program, part in zip(programs, parts, strict=True):
        assert len(part) == len(program) // BYTES, "the disassembler left instructions out"
    return parts


def _from(jump: re.Match[str], start: int) -> str:
    """A branch as it stands, with its target counted from `start`."""
    return jump[0].replace(f"0x{jump[1]}", f"0x{int(jump[1], 16) - start:x}")
