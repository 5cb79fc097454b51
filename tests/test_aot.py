"""Every kernel compiled ahead of time, and that the table would notice what it looks for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import of_a_child

HOUSE = Path(__file__).parents[1]
# The compiler, ptxas and cuobjdump come in triton's wheel, which exists for Linux only.
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="where Triton interprets, it cannot compile"),
]
ARCHS = ("sm_80", "sm_90", "sm_100")
CASES = (
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "switch-base-8",
    "qwen3, 64 rows a slot",
    "qwen3, 32 rows a slot",
    "qwen3, 12 rows a slot",
    "qwen3, adapters of 4 clients",
    "qwen3, adapters of rank 64",
    "qwen3, adapters of rank 128",
    "qwen3, int8",
    "qwen3, int4, 128 rows a slot",
    "gpt-oss, mxfp4",
    "qwen3, fp8, 64 rows a slot",
    "qwen3, z recomputed",
    "edge, float32",
)


@functools.cache
def first_asked_for(arch: str) -> dict[str, dict[Any, Any]]:
    """The jobs of an architecture, each with a launch, by the case that needs them first: none is compiled twice."""
    from bench.aot import run as aot

    found: dict[str, dict[Any, Any]] = {}
    seen: set[Any] = set()
    assert tuple(case.name for case in aot.CASES) == CASES, "a case is left out here"
    for (_, case), passes in aot.collect(aot.CASES, [arch], "").items():
        launches = {job: launch for pairs in passes.values() for launch, job in pairs}
        found[case.name] = {job: launch for job, launch in launches.items() if job not in seen}
        seen |= launches.keys()
    return found


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_passes_ahead_of_time(arch: str, case: str) -> None:
    """0 spills, shared memory, tensor cores, streaming: all that `make aot` compiles, in as many parts."""
    from operand_bytes import operand_bytes

    from bench.aot.sass import compiled_all, misses
    from fedmoe_kernels.tiles.tile import BARRIERS

    jobs = first_asked_for(arch)[case]
    assert jobs, "every case adds a kernel of its own"
    codes = dict(zip(jobs, compiled_all(list(jobs)), strict=True))
    wrong = {job: found for job, code in codes.items() if (found := misses(job, code))}
    assert not wrong, "\n".join(f"{job.kernel}: {'; '.join(found)}; {job.parts()}" for job, found in wrong.items())
    for job, launch in jobs.items():
        closed, taken = operand_bytes(launch, arch), codes[job].shared
        assert not closed or taken <= closed + BARRIERS, f"{job.kernel} takes {taken}, not {closed}; {job.parts()}"


@pytest.mark.usefixtures("bench")
def test_the_cases_above_are_all_that_the_table_has() -> None:
    from bench.aot import run as aot
    from bench.aot.table import GPU_OF

    assert tuple(case.name for case in aot.CASES) == CASES
    assert tuple(GPU_OF) == ARCHS


@pytest.mark.usefixtures("bench")
def test_other_numbers_of_tokens_and_slots_compile_nothing_again() -> None:
    from bench.aot import run as aot

    assert aot.recompiled(aot.CASES, ARCHS[:1]) == []


def test_the_command_compiles_and_shows_its_table() -> None:
    """As `make aot` does, but for one family on one architecture."""
    command = [sys.executable, "-m", "bench.aot.run", "--arch", "sm_90", "--kernel", "schedule"]
    done = subprocess.run(command, cwd=HOUSE, env=of_a_child(), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert "15 cases on 1 architectures" in done.stdout
    assert "4 different: 4 pass, 0 fall short; 0 would be compiled again" in done.stdout


@pytest.mark.usefixtures("bench")
def test_the_whole_table_passes_when_every_kernel_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cases on all architectures, with a compiler that makes flawless code."""
    from bench.aot import run as aot
    from bench.aot.listing import OPCODES, Listing
    from bench.aot.sass import Code

    def flawless(jobs: Sequence[Any], workers: int) -> dict[Any, Any]:
        described = {job: any(kind.startswith("tensordesc") for _, kind in job.signature) for job in jobs}
        opcodes = dict.fromkeys(OPCODES, 0)
        return {
            job: Code(64, listing=Listing(opcodes | {"UTMALDG": int(yes)}, loads_before_stores=True))
            for job, yes in described.items()
        }

    monkeypatch.setattr(aot, "compile_all", flawless)
    monkeypatch.setattr(sys, "argv", ["aot.py"])
    assert aot.main() == 0
    said = capsys.readouterr().out
    assert "15 cases on 3 architectures" in said
    assert "0 fall short; 0 would be compiled again" in said
    assert said.count("forward + backward") >= 1, "whole steps are predicted too"


@pytest.mark.usefixtures("bench")
def test_what_falls_short_is_in_the_table_and_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.aot import run as aot
    from bench.aot.sass import Code

    monkeypatch.setattr(aot, "compile_all", lambda jobs, workers: {job: Code(error="it spilled") for job in jobs})
    monkeypatch.setattr(aot, "CASES", aot.CASES[:1])
    monkeypatch.setattr(sys, "argv", ["aot.py", "--arch", "sm_90", "--kernel", "combine"])
    assert aot.main() == 1
    assert "it spilled" in (said := capsys.readouterr().out)
    assert "0 pass, 2 fall short" in said
    monkeypatch.setattr(sys, "argv", ["aot.py", "--arch", "sm_90", "--kernel", "no such kernel"])
    assert aot.main() == 1, "nothing compiled proves nothing"


# Runs the module that its first word names, with the interpreter as tests/interpret has it.
INTERPRETED = """
import runpy, sys
import patched_once
patched_once.install()
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

STANDARD = [  # T, H, I, E, K, gated; TFLOP and GB forward and backward, least ms forward, backward, backward all frozen
    ((8192, 4096, 14336, 8, 2, True), (5.77, 11.55), (5.1, 10.9), (5.90, 11.73, 5.90)),
    ((16384, 2048, 1024, 64, 8, True), (1.65, 3.30), (3.1, 5.6), (1.85, 3.52, 1.85)),
    ((32768, 2048, 768, 128, 8, True), (2.47, 4.95), (5.2, 9.1), (2.86, 5.36, 2.86)),
    ((16384, 2880, 2880, 32, 4, True), (3.26, 6.52), (4.1, 8.1), (3.44, 6.74, 3.44)),
    ((16384, 768, 3072, 8, 1, False), (0.155, 0.309), (0.48, 0.91), (0.172, 0.358, 0.202)),
    ((1024, 2048, 768, 128, 8, True), (0.077, 0.155), (1.33, 2.63), (0.398, 0.784, 0.409)),
]


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize(("sizes", "tflop", "gigabytes", "ms"), STANDARD, ids=lambda value: str(value)[:24])
def test_the_rooflines_by_hand(sizes: Any, tflop: Any, gigabytes: Any, ms: Any) -> None:
    from bench.common.roofline import GPUS, Layer, backward, forward, least_seconds

    T, H, I, E, K, gated = sizes  # noqa: E741
    layer = Layer(T, H, I, E, K, gated=gated)
    passes = (forward(layer), backward(layer), backward(replace(layer, Bt=0)))
    assert [sum(work.flops for work in stages) / 1e12 for stages in passes[:2]] == pytest.approx(tflop, rel=0.01)
    assert [sum(work.bytes for work in stages) / 1e9 for stages in passes[:2]] == pytest.approx(gigabytes, rel=0.02)
    assert [1e3 * least_seconds(stages, GPUS["H100"]) for stages in passes] == pytest.approx(ms, rel=0.006)


@pytest.mark.usefixtures("bench")
def test_a_prediction_is_never_below_the_roofline() -> None:
    from bench.common.roofline import GPUS, Tiling, Work, expected

    for gpu in GPUS.values():
        for work in (Work("many rows", 10**13, 10**9), Work("few rows", 10**9, 10**9), Work("copy", 0, 10**8)):
            for programs in (1, 100, 10_000):
                apart = Tiling(programs, streamed=1e5, stored=65536)
                ahead = expected(work, gpu, replace(apart, ahead=True))
                assert expected(work, gpu, apart) >= ahead > work.seconds(gpu)


def tune(*options: str, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    command = ["-c", INTERPRETED] if interpreted else ["-m"]
    environment = of_a_child(TRITON_INTERPRET="1") if interpreted else of_a_child()
    command = [sys.executable, *command, "bench.tune.run", *options]
    return subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True)


def test_the_tuner_says_without_a_gpu_what_it_would_try() -> None:
    options = ("--shape", "edge", "--rows", "64", "--family", "data_gradient", "--most", "1")
    done = tune("--dry-run", "--arch", "sm_80", *options)  # where triton 3.6 and 3.7 both spill at the tallest
    assert done.returncode == 0, done.stderr
    tried = [line for line in done.stderr.splitlines() if "registers" in line]
    assert len(tried) == 3, "one tile at each of three heights"
    assert {line.rsplit("  ", 1)[1] == "ok" for line in tried} == {True, False}, "some are refused, and it says why"
    assert "no GPU to time on" in tune().stderr or importlib.import_module("torch").cuda.is_available()


def test_the_tuner_writes_a_table_that_the_kernels_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, but with Triton's interpreter for a GPU: what is timed means nothing, what is checked does."""
    import torch

    from fedmoe_kernels.tiles.lookup import tiles_for

    out = tmp_path / "table.json"
    effort = ("--rows", "12", "--dtype", "float32", "--most", "2", "--walks", "1", "--repeats", "1", "--out", str(out))
    done = tune("--rehearse", "--arch", "sm_80", "--shape", "tiny-relu", *effort, interpreted=True)
    assert done.returncode == 0, done.stderr
    assert "written to" in done.stdout
    monkeypatch.setenv("FEDMOE_TILES", str(out))
    found = tiles_for("sm_80", torch.float32, 12, hidden=16, inner=24, gated=False)
    assert f"up              {found.rows}x{found.up.n}x" in done.stderr
