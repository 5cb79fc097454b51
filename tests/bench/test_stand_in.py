"""Triton's real runtime launches every case without a GPU, and the driver that plays libcuda refuses what it should."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import of_a_child

from bench.stand_in import driver as stand_in

HOUSE = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(stand_in.missing() is not None, reason=f"no stand-in driver: {stand_in.missing()}"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="where Triton interprets, it launches nothing"),
    pytest.mark.timeout(1800),
]
PARTS = 6  # of the cases on sm_90: each a process, so that workers share them
ELSEWHERE = {  # what differs in its limits
    "sm_80": ("qwen3-30b-a3b", "qwen3, adapters of rank 64", "qwen3, adapters of rank 128"),
    "sm_86": ("qwen3-30b-a3b", "qwen3, adapters of rank 64", "qwen3, adapters of rank 128"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, built once for all workers."""
    shared = os.environ.get("TRITON_CACHE_DIR")
    folder = tmp_path_factory.mktemp("driver") if shared is None else Path(shared).parent / "stand-in"
    return stand_in.build(folder)


def child(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with the session's cache, so that nothing is compiled twice."""
    environment = of_a_child(**variables)
    return subprocess.run([sys.executable, *words], cwd=HOUSE, env=environment, capture_output=True, text=True)


def launched(library: Path, *options: str) -> dict[str, dict[str, Any]]:
    """What `bench.stand_in.run` says of each case; the test fails where anything was refused."""
    done = child("-m", "bench.stand_in.run", "--library", str(library.parent), *options)
    found = {about["case"]: about for about in map(json.loads, done.stdout.splitlines())}
    refused = [f"{name}: {'; '.join([about['error'], *about['findings']])}" for name, about in found.items()]
    wrong = [line for line, about in zip(refused, found.values(), strict=True) if about["error"] or about["findings"]]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stderr[-4000:]
    return found


def part(names: list[str], number: int) -> list[str]:
    """Neighbours, for they share kernels."""
    return names[number * len(names) // PARTS : (number + 1) * len(names) // PARTS]


@pytest.mark.parametrize("number", range(PARTS))
def test_every_case_is_launched_on_hopper(library: Path, number: int) -> None:
    from bench.stand_in.run import ALL

    asked = {case.name: case for case in ALL if case.name in part([case.name for case in ALL], number)}
    found = launched(library, *(word for name in asked for word in ("--case", name)))
    assert found.keys() == asked.keys()
    for name, about in found.items():
        case = asked[name]
        assert about["launches"] == sum(about["kernels"].values())
        assert about["launches"] >= (9 if case.T == 0 else 19), name
        # By descriptor are read: bfloat16 and float16 with rows at multiples of 16 bytes, where there is a row at all.
        by_descriptor = case.T > 0 and case.dtype.itemsize == 2 and case.H * 2 % 16 == 0 == case.I * 2 % 16
        assert bool(about["descriptors"]) == by_descriptor, name


@pytest.mark.parametrize("arch", ELSEWHERE)
def test_ampere_has_less_shared_memory_and_no_descriptors(library: Path, arch: str) -> None:
    found = launched(library, "--arch", arch, *(word for name in ELSEWHERE[arch] for word in ("--case", name)))
    assert found.keys() == set(ELSEWHERE[arch])
    assert all(about["launches"] > 25 and about["descriptors"] == 0 for about in found.values())


def test_a_model_reaches_the_same_launches_through_route_and_moe_mlp(library: Path) -> None:
    from bench.stand_in.run import PUBLIC

    found = launched(library, "--public")
    assert found.keys() == set(PUBLIC)
    drivers = launched(library, *(word for name in PUBLIC for word in ("--case", name)))
    for name, about in found.items():
        assert about["launches"] >= 7, name
        assert about["descriptors"] == drivers[name]["descriptors"], name


@pytest.fixture(scope="module")
def said(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that stand_in_probe.py asked for, by name; it watches its cache, so it has one of its own."""
    own = str(tmp_path_factory.mktemp("cache"))
    done = child("-m", "stand_in_probe", str(library.parent), TRITON_CACHE_DIR=own)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


REFUSED = {
    "a box of 257": "box size 257 of axis 1 is outside 1..256",
    "a box of 0": "box size 0 of axis 1 is outside 1..256",
    "an inner box wider than the swizzle": "inner row of 256 bytes is wider than the swizzle of 128",
    "an inner box of 24 bytes": "inner row of 24 bytes is not a multiple of 16",
    "a box larger than shared memory": "a box of 262144 bytes does not fit the 232448",
    "a stride of 4104": "stride 4104 bytes of axis 1 is not a multiple of 16",
    "a stride of 2^40": "of axis 2 is not below 2^40",
    "a stride less than a row": "stride 2048 bytes of axis 1 is less than the 4096",
    "an address off 16 bytes": "the address is 8 bytes past a multiple of 16",
    "a null address": "the address is null",
    "a size of 0": "size 0 of axis 1 is outside 1..2^32",
    "a size over 2^32": "size 4294967297 of axis 2 is outside 1..2^32",
    "rank 0": "rank 0 is outside 1..5",
    "rank 6": "rank 6 is outside 1..5",
    "an element stride of 9": "element stride 9 of axis 1 is outside 1..8",
    "an unknown type": "data type 99 is unknown",
    "NaN for integers": "NaN cannot fill data type 1",
    "interleaved by 32 bytes": "needs the swizzle of 32 bytes",
    "a map off its alignment": "the map is not at a multiple of",
    "triton, a grid too large along y": "_product: grid of 65536 along y is outside 1..65535",
    "triton, a grid too large along z": "_product: grid of 65536 along z is outside 1..65535",
    "no program": "_product: grid of 0 along x is outside 1..2^31-1",
    "a grid of 2^31": "_product: grid of 2147483648 along x is outside",
    "1056 threads": "_product: 1056 threads a block are outside 1..1024",
    "65 along z": "_product: 65 threads a block are outside 1..1024 (z: 64)",
    "no machine code": "the image is not machine code",
    **{
        f"{arch} before opt-in": "49153 bytes of dynamic shared memory; the function was given 49152"
        for arch in stand_in.LIMITS
    },
    **{
        f"{arch} {call} 1": f"{limits.shared_block + 1} bytes of dynamic shared memory"
        for arch, limits in stand_in.LIMITS.items()
        for call in ("attribute", "launch")
    },
    **{f"{arch} map": "has no tensor maps" for arch in ("sm_80", "sm_86")},
}
ALLOWED = (
    *("good", "filled with NaN", "triton, good"),
    *(f"{arch} {call} 0" for arch in stand_in.LIMITS for call in ("attribute", "launch")),
    *(f"{arch} map" for arch in ("sm_90", "sm_100", "sm_120")),
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_a_limit_is_refused_and_named(said: dict[str, Any], name: str) -> None:
    (line,) = said[name]["findings"]
    assert REFUSED[name] in line
    assert said[name].get("result") != 0, "the call returns an error too"
    assert "result" in said[name] or "invalid argument" in said[name]["error"]


@pytest.mark.parametrize("name", ALLOWED)
def test_what_lies_at_a_limit_is_allowed(said: dict[str, Any], name: str) -> None:
    assert said[name]["findings"] == []
    assert said[name].get("result", 0) == 0


def test_the_probe_has_no_case_that_no_test_reads(said: dict[str, Any]) -> None:
    other = {"another architecture", "compiled again", "launched", "many"}
    assert said.keys() == {*REFUSED, *ALLOWED} | other


def test_the_driver_counts_what_was_launched(said: dict[str, Any]) -> None:
    assert said["triton, good"]["counts"] == {"launches": 1, "descriptors": 0, "kernels": {"_product": 1}}
    assert said["many"] == [257, "and 44 more"], "256 lines are kept"
    registers, by_the_tool = said["triton, good"]["registers"]
    assert registers == by_the_tool > 0


def test_what_is_compiled_ahead_of_time_is_what_the_runtime_launches(said: dict[str, Any]) -> None:
    """By the key of Triton's cache: compiling the job of a launch that ran adds no entry."""
    assert said["launched"] == 1
    assert said["compiled again"] == []


def test_a_process_has_one_architecture(said: dict[str, Any]) -> None:
    assert "a process for each arch" in said["another architecture"]


def test_the_limits_are_those_that_the_tiles_are_made_for() -> None:
    from fedmoe_kernels.tiles.lookup import SHARED, arch_of_capability

    assert {arch: stand_in.LIMITS[arch].shared_block for arch in SHARED} == SHARED
    assert [arch_of_capability(*stand_in.LIMITS[arch].capability) for arch in SHARED] == list(SHARED)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no limits are known of 'sm_75'"):
        stand_in.activate(tmp_path / "libcuda.so.1", "sm_75")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stand_in.shutil, "which", lambda name: None)
    assert "no C compiler" in str(stand_in.missing())
    with pytest.raises(RuntimeError, match=re.escape("cannot build the stand-in driver: there is no C compiler")):
        stand_in.build(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert stand_in.missing() == "triton is not installed"


def test_a_broken_source_says_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int here(void) { return missing; }\n", encoding="utf-8")
    monkeypatch.setattr(stand_in, "SOURCE", source)
    with pytest.raises(RuntimeError, match=r"failed on broken\.c:(?s:.*)missing"):
        stand_in.build(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_interpreted_process_is_refused(library: Path) -> None:
    first = "import os; os.environ['TRITON_INTERPRET'] = '1'"
    code = f"{first}; from bench.stand_in import driver; driver.activate({str(library)!r}, 'sm_90')"
    done = child("-c", code)
    assert "Triton interprets kernels in this process" in done.stderr


def test_host_times_are_kept_with_their_launches(library: Path, tmp_path: Path) -> None:
    """How long anything took is not asserted."""
    done = child("-m", "bench.host", "--rounds", "2", "--keep", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    (kept,) = tmp_path.glob("host-triton-*.json")
    found = json.loads(kept.read_text(encoding="utf-8"))
    assert found["triton"] in kept.name
    rows = {(row["case"], row["what"]): row for row in found["rows"]}
    assert all(low <= row["us"] <= high for row in found["rows"] for low, high in [row["quartiles"]])
    quarter = {what: row for (case, what), row in rows.items() if case == "a quarter trains"}
    assert [quarter[f"experts.{name}"]["launches"] for name in ("forward", "backward")] == [4, 9]
    assert quarter["moe_mlp"]["launches"] == 6  # with importance sums: two more, of the outputs' norms
    assert quarter["route, moe_mlp and their backward"]["launches"] == 18
    assert rows["floor", "an operator of 28 arguments"]["launches"] == 0
    assert rows["floor", "an empty kernel of two arguments"]["launches"] == 1
    assert "| a quarter trains | moe_mlp | 6 |" in kept.with_suffix(".md").read_text(encoding="utf-8")
