"""What a launch compiles to, and that each gate of the ahead-of-time table sees what it is for."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="where Triton interprets, it cannot compile"),
]


def small(**changes: Any) -> Any:
    from bench.aot.cases import CASES

    return replace(CASES[0], **{"T": 2048, "B": 16, "Bt": 4, "K": 2, "E": 16, **changes})


def one(case: Any, name: str, arch: str) -> Any:
    """The first launch of a case whose kernel has `name` in its name."""
    from bench.aot.cases import launches

    found = itertools.chain.from_iterable(launches(case, arch).values())
    return next(launch for launch in found if name in launch.kernel.fn.__name__)


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_launch_fits_the_shared_memory_in_closed_form(arch: str) -> None:
    """All rows classes, ranks, element sizes and forms, without a compiler; the test above compares some with one."""
    import torch
    from operand_bytes import operand_bytes

    from bench.aot.cases import CASES, launches
    from bench.aot.sass import table_of
    from fedmoe_kernels.tiles.tile import BARRIERS, SHARED

    table, seen = table_of(arch), 0
    for case, tokens, rank, dtype, activation in itertools.product(
        (CASES[0], replace(CASES[1], bias=False)),
        (32768, 1024, 512, 192),
        (0, 8, 16, 32, 64, 128, 256),
        (torch.bfloat16, torch.float32),
        ("swiglu", "relu"),
    ):
        sizes = {"T": tokens * case.B // 128, "K": 8, "rank": rank, "Bt": 0 if rank else case.Bt}
        changed = replace(case, **sizes, dtype=dtype, activation=activation)
        for launch in itertools.chain.from_iterable(launches(changed, table).values()):
            taken = operand_bytes(launch, arch)
            seen += taken > 0
            assert taken + BARRIERS <= SHARED[table], f"{launch.kernel.fn.__name__} of {changed} takes {taken} bytes"
    assert seen > 2000


@pytest.mark.usefixtures("bench")
def test_the_closed_form_sees_a_weight_gradient_that_holds_too_many_steps() -> None:
    """The stages that a gathered operand shares with its row index, given to one in order: 286,720 bytes of 232,448."""
    from operand_bytes import operand_bytes

    from bench.aot.cases import CASES, launches

    case = next(case for case in CASES if case.rank == 64)
    found = [launch for launch in launches(case, "sm_90")["backward"] if "_weight" in launch.kernel.fn.__name__]
    in_order = [one for one in found if one.args["left_tokens"] is None and one.args["right_tokens"] is None]
    assert len(in_order) == 2
    assert max(operand_bytes(launch, "sm_90") for launch in in_order) == 163_840
    assert max(operand_bytes(replace(launch, stages=7), "sm_90") for launch in in_order) == 286_720


def assemblers() -> dict[str, Path]:
    """Every ptxas here: the one that Triton uses, its second one, and that of a CUDA toolkit on the path."""

    from bench.aot.listing import TOOLS

    found = {"triton's": TOOLS / "ptxas", "triton's second": TOOLS / "ptxas-blackwell"}
    other = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    return {**found, **({"the toolkit's": Path(other)} if other else {})}


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("kernel", ["_up", "_rows", "_persistent", "_data_gradient", "_weight_gradient"])
def test_other_assemblers_make_code_of_the_same_kind(kernel: str, tmp_path: Path) -> None:
    """ptxas 12.8 is known to miscompile some kernels: others must take the same PTX, and pass the same gates."""
    from bench.aot.listing import instructions, listings, usage
    from bench.aot.sass import built, compiled, job_of, misses

    # Where tokens have one choice, a product of rows has a program a tile.
    case = small(T=16384, K=1 if kernel == "_rows" else 2)
    job = job_of(one(case, kernel, "sm_90"), "sm_90")
    code = compiled(job)
    (tmp_path / "kernel.ptx").write_text(built(job).asm["ptx"])
    tried = 0
    for name, tool in assemblers().items():
        limit = ["--maxrregcount", str(job.limit)] if job.limit else []
        command = [tool, "-arch=sm_90a", *limit, tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        cubin = (tmp_path / "kernel.cubin").read_bytes()
        registers, stack = usage(cubin)
        (listing,) = listings(90, [instructions(cubin)])
        other = replace(code, registers=registers, stack=stack, listing=listing)
        assert misses(job, other) == [], f"{name}, {tool}"
        tried += 1
    assert tried >= 2


@pytest.mark.usefixtures("bench")
def test_a_job_is_what_triton_would_compile() -> None:
    """Alignment, ones and constants as the JIT sees them; a cohort's numbers do not enter."""
    from bench.aot.sass import job_of

    case = small()
    launch = one(case, "_up", "sm_90")
    job = job_of(launch, "sm_90")
    parts = job.parts()
    assert parts["x"] == "*bf16 16"
    assert parts["w"].startswith("tensordesc<bf16[")
    assert parts["H"] == "constexpr = 2048"
    assert parts["tiles"] == "i32"
    assert job == job_of(one(case.varied(), "_up", "sm_90"), "sm_90")
    assert job_of(one(case, "_up", "sm_80"), "sm_80").parts()["w"] == "*bf16 16"


@pytest.mark.usefixtures("bench")
def test_a_spill_is_seen() -> None:
    """The data gradient of 128 x 128 in one piece needs more registers than there are: it is why tiles have `split`."""
    from bench.aot.sass import compiled, job_of, misses

    launch = one(small(), "_data_gradient", "sm_90")
    assert launch.args["SPLIT"] > 1
    whole = replace(launch, args={**launch.args, "SPLIT": 1}, registers=0)
    job = job_of(whole, "sm_90")
    code = compiled(job)
    assert code.registers == 255
    assert any("spills" in miss for miss in misses(job, code))


@pytest.mark.usefixtures("bench")
def test_too_much_shared_memory_is_seen() -> None:
    from bench.aot.sass import compiled, job_of, misses

    launch = replace(one(small(), "_up", "sm_90"), stages=12)
    job = job_of(launch, "sm_90")
    assert any("shared memory" in miss for miss in misses(job, compiled(job)))


@pytest.mark.usefixtures("bench")
def test_the_gates_by_hand() -> None:
    from bench.aot.listing import Listing
    from bench.aot.sass import Code, Dot, job_of, misses

    job = job_of(one(small(), "_up", "sm_90"), "sm_90")
    tall, low = Dot(128, 128, 64, "bf16", "tf32", True), Dot(16, 128, 64, "bf16", "tf32", True)
    none = dict.fromkeys(("HGMMA", "UTCHMMA", "HMMA", "LDGSTS", "UTMALDG", "LDG", "STL", "LDL", "ATOMG"), 0)
    good = none | {"HGMMA": 4, "LDGSTS": 8, "UTMALDG": 4}

    def told(job: Any, dots: tuple[Any, ...], listing: Listing, **changes: Any) -> str:
        return "; ".join(
            misses(job, Code(**{"registers": 100, "shared": 1000, "dots": dots, "listing": listing} | changes))
        )

    def found(dots: tuple[Any, ...], **opcodes: int) -> str:
        return told(job, dots, Listing(good | opcodes))

    assert found((tall,)) == ""
    assert "no HGMMA" in found((tall,), HGMMA=0)
    assert "HMMA where none" in found((tall,), HMMA=1)
    assert found((low,), HGMMA=0, HMMA=4) == ""
    assert "HGMMA where none" in found(())
    assert "pass through registers" in found((tall,), LDGSTS=0, UTMALDG=0)
    assert "no UTMALDG" in found((tall,), UTMALDG=0)
    assert "spills" in found((tall,), STL=1)
    assert "atomics" in found((tall,), ATOMG=1)
    exact = Dot(64, 64, 32, "f32", "ieee", True)
    assert "HGMMA where none" in found((exact,)), "float32 is exact unless TF32 is allowed"
    assert misses(job, Code(error="CompilationError: no")) == ["CompilationError: no"]
    assert "1 HGMMA with the left operand in registers" in told(job, (tall,), Listing(good, left_in_registers=1))
    assert told(job, (tall,), Listing(good, loop=118)) == ""
    assert "119 instructions in the loop of products, 118 at most" in told(job, (tall,), Listing(good, loop=119))
    in_turn = job_of(one(small(T=16384), "_persistent", "sm_90"), "sm_90")
    assert told(in_turn, (tall,), Listing(good, loads_before_stores=True)) == ""
    for apart in (False, None):
        assert "do not arrive while a tile is stored" in told(
            in_turn, (tall,), Listing(good, loads_before_stores=apart)
        )
    sent = job_of(one(small(T=16384), "_data_gradient", "sm_90"), "sm_90")
    assert sent.limit == 128
    assert told(sent, (tall,), Listing(good), registers=128, shared=98328) == ""
    assert "1 programs an SM, 2 were counted on" in told(sent, (tall,), Listing(good), registers=136, shared=98328)
    little = Listing(good | {"STL": 2, "LDL": 2}, loop=100)
    assert told(sent, (tall,), little, registers=128, stack=64) == "", "the price of the limit, outside the loop"
    assert "spills 72" in told(sent, (tall,), little, registers=128, stack=72)
    assert "spills 8" in told(sent, (tall,), replace(little, loop_spills=1), registers=128, stack=8)
    assert "spills 8" in told(sent, (tall,), replace(little, loop=0), registers=128, stack=8), (
        "nothing is outside a loop"
    )
    assert "spills 8" in told(replace(sent, limit=0), (tall,), little, registers=128, stack=8)
    coded = job_of(one(small(format="int8", Bt=0), "_up", "sm_90"), "sm_90")
    assert coded.constant("FORMAT") == "int8"
    assert told(coded, (tall,), little, registers=128, stack=16) == ""
    assert "spills 24" in told(coded, (tall,), little, registers=128, stack=24)


@pytest.mark.usefixtures("bench")
def test_the_loop_of_products_is_the_shortest_that_has_one() -> None:
    from bench.aot.listing import read

    lines = ["NOP ;"] * 40
    lines[10] = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24 ;"
    lines[12] = "STL [R1], R4 ;"
    lines[20] = "@P0 BRA 0x50 ;"  # from 20 back to 5
    lines[25] = "@!P0 BRA 0x180 ;"  # a wait between: a loop without a product
    lines[30] = "BRA 0x10 ;"  # the whole
    lines[33] = "LDL R4, [R1] ;"
    found = read(lines)
    assert (found.loop, found.loop_spills, found.left_in_registers) == (16, 1, 0)
    assert (found.opcodes["HGMMA"], found.opcodes["STL"], found.opcodes["LDL"]) == (1, 1, 1)
    lines[10] = "HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR20], R24, gsb0 ;"
    assert read(lines).left_in_registers == 1
    assert read(["HMMA.16816.F32.BF16 R4, R8, R12, R4 ;", "BRA 0x40 ;"]).loop == 0, "a jump ahead is no loop"


@pytest.mark.usefixtures("bench")
def test_a_loop_that_stores_is_as_long_as_the_shortest_way_around_it() -> None:
    """Steps and tiles in one loop: most steps jump over the beginning of a tile and over its end."""
    from bench.aot.listing import read

    lines = ["NOP ;"] * 40
    lines[6] = "@P0 BRA 0xa0 ;"  # from 6 to 10, over the beginning of a tile
    lines[12] = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24 ;"
    lines[14] = "@UP0 UTMALDG.2D [UR24], [UR10] ;"
    lines[15] = "@P1 BRA 0x1c0 ;"  # from 15 to 28, over the end of a tile
    lines[20] = "@!P2 STG.E.128 desc[UR56][R50.64], R64 ;"
    lines[30] = "@P0 BRA 0x50 ;"  # from 30 back to 5
    lines[38] = "BRA 0xb0 ;"  # behind the program, from what waited for a barrier
    found = read(lines)
    assert (found.loop, found.loads_before_stores) == (2 + 6 + 3, True)
    lines[14], lines[22] = lines[22], lines[14]
    assert read(lines).loads_before_stores is False
    lines[20] = "NOP ;"
    found = read(lines)
    assert (found.loop, found.loads_before_stores) == (26, None)


@pytest.mark.usefixtures("bench")
def test_the_products_of_a_kernel_are_read_off_its_source_form() -> None:
    from bench.aot.sass import Dot, _dots

    text = """
    tt.func public @k(%a: i32) {
      %0 = tt.dot %x, %y, %z : tensor<64x16xf32> * tensor<16x32xf32> -> tensor<64x32xf32>
      %1 = scf.for %i = %c0 to %a step %c1 iter_args(%acc = %0) -> (tensor<64x32xf32>)  : i32 {
        %2 = tt.dot %u, %v, %acc, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x32xbf16> -> tensor<64x32xf32>
        scf.yield %2 : tensor<64x32xf32>
      }
      %3 = tt.dot %x, %y, %1, inputPrecision = tf32 : tensor<64x16xf32> * tensor<16x32xf32> -> tensor<64x32xf32>
    }
    """
    assert _dots(text) == [
        Dot(64, 32, 16, "f32", "ieee", False),
        Dot(64, 32, 64, "bf16", "tf32", True),
        Dot(64, 32, 16, "f32", "tf32", False),
    ]
