"""What the GPU script derives: goals, predicted memory, rooflines; and its GPU branches, on a pretended device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import NAME, pretend_gpu


def row(case: str, peer: str, name: str, ms: float, **more: Any) -> dict[str, Any]:
    base = {"shape": "qwen3-30b-a3b", "case": case, "peer": peer, "pass": name, "launch": "eager", "ms": ms}
    base |= {"sizes": [32768, 2048, 768, 128, 8], "stores_all": not peer.startswith("fedmoe"), "roofline of": "sheet"}
    return base | {"MB": None, "MB kept": None, "TFLOP/s": 0.0, "percent_of_roofline": 0.0} | more


def measured(*rows: dict[str, Any], gpu: str = NAME) -> dict[str, Any]:
    return {"about": {"rehearsal": False, "gpu": gpu}, "rows": list(rows)}


def verdicts(*rows: dict[str, Any]) -> list[str]:
    from bench.gpu.goals import goals

    return [goal.verdict for goal in goals(measured(*rows))]


def test_goals_without_rows_are_not_measured() -> None:
    assert verdicts() == ["not measured"] * 8


def test_goals_are_met_or_not() -> None:
    memory = {"MB": 3000.0, "MB predicted": 3001.0, "MB kept": 940.0}
    good = [
        row("all", "fedmoe", "fwd", 4.0, **{"TFLOP/s": 461.0}),
        row("all", "fedmoe", "fwd+bwd", 17.0, **{"TFLOP/s": 431.0}, **memory),
        row("small", "fedmoe", "fwd", 0.9, percent_of_roofline=45.0),
        row("small", "fedmoe", "fwd", 0.5, percent_of_roofline=76.0, launch="graph"),
        row("small", "fedmoe", "fwd+bwd", 1.5, percent_of_roofline=75.0),
        row("eighth-quarter", "fedmoe", "fwd+bwd", 10.0),
        row("eighth-quarter", "grouped_mm", "fwd+bwd", 14.1),
        row("eighth-quarter", "liger", "fwd+bwd", 15.0),
        row("small-eighth-quarter", "fedmoe", "fwd+bwd", 1.0),
        row("small-eighth-quarter", "grouped_mm", "fwd+bwd", 3.0),
        row("small-eighth-quarter", "grouped_mm", "fwd+bwd", 2.1, launch="graph"),
        row("small-eighth-quarter", "grouped_mm-compact", "fwd+bwd", 0.5, stores_all=False),
        row("small-eighth-quarter", "dense", "fwd+bwd", 0.1),
    ]
    assert verdicts(*good) == ["met"] * 8
    slower = [r | {"ms": 2 * r["ms"], "TFLOP/s": r["TFLOP/s"] / 2} if r["peer"] == "fedmoe" else r for r in good]
    worse = [r | {"percent_of_roofline": r["percent_of_roofline"] / 2, "MB": r["MB"] and 3002.0} for r in slower]
    sonic = row("all", "sonicmoe", "fwd+bwd", 15.0, **{"MB kept": 939.0})
    assert verdicts(*worse, sonic) == ["not met"] * 8


def test_no_goal_is_beyond_what_the_model_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the code itself, compiled here: all experts trainable, at both numbers of tokens."""
    pytest.importorskip("triton")
    from dataclasses import replace

    from bench.aot.cases import QWEN, launches
    from bench.aot.sass import code_of, job_of
    from bench.aot.table import Row, Step
    from bench.gpu.goals import NEAR_ROOF, RATES

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {}
    for T in (32768, 1024):
        case = replace(QWEN, T=T, Bt=QWEN.B)
        rows = {}
        for name, started in launches(case, "sm_90").items():
            jobs = [(launch, job_of(launch, "sm_90")) for launch in started]
            rows[name] = [Row(case, launch, job, code_of(job), ()) for launch, job in jobs]
        found[T] = Step("sm_90", case, rows).passes()
    for name, wanted in RATES.items():
        passed = "forward" if name == "fwd" else "forward + backward"
        assert wanted <= found[32768][passed]["expected_tflops"], name
        assert 100 * found[1024][passed]["of_roof"] >= NEAR_ROOF, name


def test_goals_on_another_gpu_say_so() -> None:
    from bench.gpu.goals import summary

    lines = summary(measured(row("all", "fedmoe", "fwd", 4.0, **{"TFLOP/s": 600.0}), gpu="NVIDIA H200"))
    assert "this is NVIDIA H200" in lines[0]
    assert "met: fwd of qwen3-30b-a3b" in lines[1]


@pytest.mark.parametrize("recompute", [False, True])
def test_predicted_memory_is_what_the_driver_allocates(recompute: bool) -> None:
    """Closed form against a dry step of the driver, at the standard shapes, where something is trained."""
    pytest.importorskip("triton")
    from bench.aot.dry_step import predicted, sizes_of
    from bench.common.cases import CLIENT_CASES, STANDARD

    for shape in STANDARD:
        for case in (case for case in CLIENT_CASES if case.trainable):
            seen = sizes_of(shape, case, "sm_90", recompute=recompute)
            said = predicted(shape, case, "sm_90", dtype=torch.bfloat16, recompute=recompute)
            assert seen.peak <= said.peak <= 1.02 * seen.peak + 10**5, (shape.name, case.name)
            assert seen.kept <= said.kept <= 1.01 * seen.kept + 10**5, (shape.name, case.name)


def test_no_more_is_kept_between_the_passes_than_by_sonicmoe() -> None:
    """Its closed form is x, z and 16 bytes of indices a row; y, as large as x, stands in for x."""
    pytest.importorskip("triton")
    from bench.aot.dry_step import sizes_of
    from bench.common.cases import CLIENT_CASES, STANDARD
    from bench.common.roofline import Layer

    assert CLIENT_CASES[0].name == "all"
    for shape in STANDARD:
        layer = Layer(shape.T, shape.H, shape.I, shape.E, shape.K, gated=shape.F == 2 * shape.I)
        assert sizes_of(shape, CLIENT_CASES[0], "sm_90").kept <= layer.kept_bytes, shape.name


def test_a_dry_step_names_every_launch_once() -> None:
    pytest.importorskip("triton")
    from bench.aot.dry_step import launches_of
    from bench.common.cases import CLIENT_CASES, STANDARD

    names = [launch.name for launch in launches_of(STANDARD[0], CLIENT_CASES[0], "sm_90")]
    assert names.count("weight_gradient") == 2
    assert names.count("combine") == 2
    frozen = [launch.name for launch in launches_of(STANDARD[0], CLIENT_CASES[5], "sm_90")]
    assert "weight_gradient" not in frozen


def test_rooflines_count_what_the_case_asks_for() -> None:
    """The least times of the Qwen3 shape on an H100, computed by hand from its stages' FLOPs and bytes."""
    from bench.common.cases import CLIENT_CASES, STANDARD
    from bench.common.roofline import GPUS, backward, forward, least_seconds
    from bench.gpu.measure.timing import layer_of

    task = _hollow(STANDARD[0], CLIENT_CASES[0])
    layer = layer_of(task)
    assert (layer.B, layer.Bt, layer.share) == (128, 128, 1.0)
    assert 1e3 * least_seconds(forward(layer), GPUS["H100"]) == pytest.approx(2.86, abs=0.03)
    assert 1e3 * least_seconds(backward(layer), GPUS["H100"]) == pytest.approx(5.36, abs=0.06)


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        (None, None),
    ],
)
def test_peaks_are_those_of_the_very_gpu(name: str | None, sheet: str | None) -> None:
    from bench.common.machine import data_sheet

    found = data_sheet(name)
    assert (found and found.name) == sheet


def _hollow(shape: Any, case: Any) -> Any:
    """A problem that has its routing and no weights."""
    from bench.common.cases import Problem

    everyone = torch.ones(shape.E, dtype=torch.bool)
    x_TH = torch.empty(shape.T, shape.H, dtype=torch.bfloat16, device="meta")
    experts_TK = torch.arange(shape.T * shape.K).view(shape.T, shape.K) % shape.E
    return Problem(shape, case, x_TH, x_TH, experts_TK, x_TH, {}, everyone, everyone)


def test_a_gpu_run_end_to_end_on_a_pretended_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times, graphs, memory, ceilings and goals go under the GPU's name; a peer that cannot be captured is recorded."""
    from bench.common import cases, machine, peers_graphed
    from bench.gpu import invocation, parts, workers
    from bench.gpu import run as gpu
    from bench.gpu.measure import model as gpu_model
    from bench.gpu.measure import routing as gpu_routing
    from bench.gpu.measure.store import Record

    def passed(name: str, run: Any) -> Record:
        return {"name": name, "part": "correct", "status": "passed", "detail": "pretended"}

    shape = cases.Shape("qwen3-30b-a3b", 64, 32, 16, 8, 2)
    monkeypatch.setattr(invocation, "STANDARD", (shape,))
    for module in (invocation, parts):
        monkeypatch.setattr(module, "backend_of", lambda options: "auto")
    monkeypatch.setattr(machine, "ceilings", lambda *_, **__: {"product TFLOP/s": 700.0, "copy TB/s": 3.0})
    monkeypatch.setattr(workers, "run", lambda names, *_: (passed(name, None) for name in names))
    # The slot loops of the CPU read how many rows each slot has, so only what was captured can be replayed here.
    monkeypatch.setattr(peers_graphed, "redrawn", lambda task, seed: task)
    monkeypatch.setattr(gpu_routing, "ROUTERS", gpu_routing.TINY)
    monkeypatch.setattr(gpu_model, "REAL", gpu_model.TINY)
    words = ["--cases", "all,small", "--results", str(tmp_path), "--sustained", "0.1"]
    with pretend_gpu(monkeypatch):
        codes = [gpu.main([part, *words]) for part in ("facts", "correct", "time", "routing", "model", "plot")]
        assert codes == [0] * 6, capsys.readouterr()
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("gpu-h100-80gb-hbm3-")
    data = json.loads(path.read_text())
    assert "warning" not in data
    rows = [r for r in data["rows"] if r["peer"] == "fedmoe"]
    assert {(r["launch"], r["pass"]) for r in rows} == {
        *(("eager", name) for name in ("fwd", "bwd", "fwd+bwd")),
        *(("graph", name) for name in ("fwd", "fwd+bwd")),
        ("sustained", "fwd+bwd"),
    }
    cold = [r for r in rows if r["launch"] != "sustained"]
    assert all(r["gpu"] == NAME and r["dtype"] == "bfloat16" and r["rounds"] == 25 for r in cold)
    assert all(r["host ms"] > 0 for r in rows if r["launch"] == "eager")
    assert all(r["TB/s"] > 0 and r["first step s"] > 0 for r in rows)
    assert all(r["launches"] > 8 for r in rows), "a step has as many launches at least"
    assert all(r["MB step"] == 3.0 and r["MB predicted"] > 0 and r["percent_of_roofline"] > 0 for r in rows)
    missing = {r["peer"] for r in data["left_out"] if r["status"] == "not importable"}
    assert missing <= {"liger", "scattermoe", "sonicmoe", "megablocks", "triton_kernels"}
    replayed = [r for r in data["rows"] if r["peer"] == "fedmoe-graphed"]
    assert {r["launch"] for r in replayed} == {"eager", "sustained"}, "a graph is not captured into another"
    assert all(max(r["errors"].values()) < 1e-2 and r["MB predicted"] is None for r in replayed)
    assert "roofline.png" in "".join(p.name for p in tmp_path.glob("*.png"))
    routed = [(r["router"], r["peer"], r["pass"]) for r in data["routing"]]
    assert len(set(routed)) == len(routed) == 8
    assert all(r["us"] > 0 and r["host us"] > 0 and r["red"] == [] for r in data["routing"])
    assert {r["peer"] for r in data["models"]} == {"fedmoe", "transformers"}
    assert all(r["tokens/s"] == pytest.approx(24e3 / r["ms"]) and r["dtype"] == "bfloat16" for r in data["models"])
    table = path.with_suffix(".md").read_text()
    assert "| tiny, sigmoid (64, 16, 4) | bwd | fedmoe |" in table
    assert "| tiny qwen3, 2 layers | 2 x 12 | transformers |" in table
    said = capsys.readouterr().out
    assert "reached, copy TB/s: 3" in said
    assert "not met: fwd of qwen3-30b-a3b" in said


class _Kept(list):
    """In the place of a store: what a part adds."""

    def add(self, name: str, records: list[dict[str, Any]]) -> None:
        self.extend(records)


def _counted(said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Kept:
    """What the part `ncu` keeps of a profiler that says this."""
    from types import SimpleNamespace

    from bench.gpu import more as gpu_more

    program = tmp_path / "ncu"
    (tmp_path / "said").write_text(said)
    program.write_text(f"#!/bin/sh\ncat {tmp_path / 'said'}\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu_more, "find_ncu", lambda: str(program))
    kept = _Kept()
    run = SimpleNamespace(options=SimpleNamespace(device="cuda"), words=[], store=kept)
    import time

    assert gpu_more.ncu(run, time.monotonic() + 20) == 0
    return kept


def test_the_profilers_counters_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected to process 7", head]
    lines += ['"0","7","_data_gradient_kernel","GPU Speed Of Light Throughput","Duration","us","2,290.1"']
    lines += ['"0","7","_data_gradient_kernel","Occupancy","Achieved Occupancy","%","24.1"']
    (first, second) = _counted("\n".join(lines), 0, tmp_path, monkeypatch)
    assert first == {
        "kernel": "_data_gradient_kernel",
        "launch": "0",
        "metric": "Duration",
        "unit": "us",
        "value": "2,290.1",
    }
    assert second["metric"] == "Achieved Occupancy"
    assert "2,290.1 us" in capsys.readouterr().out


def test_a_profiler_that_may_not_count_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    assert _counted(refusal, 1, tmp_path, monkeypatch) == []
    said = capsys.readouterr().out
    assert said.startswith("skipped: ncu counted nothing (code 1): ")
    assert "ERR_NVGPUCTRPERM" in said


def _store(tmp_path: Path) -> Any:
    from bench.gpu.measure.store import Store

    about = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit", "kernels", "harness", "tiles"), "none")
    return Store(about | {"device": "cpu", "rehearsal": True, "date": "2026-01-01"}, tmp_path)


def test_routing_that_disagrees_is_red_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench.gpu.measure import routing as gpu_routing

    store, router = _store(tmp_path), gpu_routing.TINY[1]
    assert gpu_routing.measure(router, "cpu", "auto", 2, store)
    assert {row["peer"] for row in store.data["routing"]} == {"fedmoe", "torch"}
    before = list(store.data["routing"])
    assert gpu_routing.measure(router, "cpu", "auto", 2, store)
    assert store.data["routing"] == before, "what is measured is not measured again"
    honest = gpu_routing.by_torch(router, None)
    wrong = {
        "the weights": lambda made: made._replace(weights_TK=made.weights_TK * 1.01),
        "the rows of torch": lambda made: made._replace(places_R=made.places_R.flip(0)),
        "the experts": lambda made: made._replace(experts_TK=(made.experts_TK + 1) % router.E),
    }
    for what, change in wrong.items():
        store.data["routing"].clear()
        monkeypatch.setattr(
            gpu_routing, "by_torch", lambda *_, change=change: lambda logits_TE: change(honest(logits_TE))
        )
        monkeypatch.setattr(gpu_routing, "by_fedmoe", lambda *_: honest)
        assert not gpu_routing.measure(router, "cpu", "auto", 2, store)
        assert store.data["routing"] == []
        assert what in store.data["left_out"][-1]["reason"]


def test_a_model_whose_experts_disagree_is_red_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import time

    from bench.gpu.measure import model as gpu_model
    from fedmoe_bindings.transformers.stock import experts as transformers_experts

    store, until = _store(tmp_path), time.monotonic() + 600
    assert gpu_model.measure(gpu_model.TINY, "cpu", torch.float32, 2, store, until)
    assert len(store.data["models"]) == 2
    assert all(0 < row["gradients differ by"] < 1e-5 for row in store.data["models"]), "two ways, and not one twice"
    store.data["models"].clear()
    real = transformers_experts.moe_mlp
    monkeypatch.setattr(transformers_experts, "moe_mlp", lambda *a, **how: 1.005 * real(*a, **how))
    assert gpu_model.measure(gpu_model.TINY, "cpu", torch.float32, 2, store, until) is False
    assert store.data["models"] == []
    assert "fedmoe is off by" in store.data["left_out"][-1]["reason"]
    assert gpu_model.measure(gpu_model.TINY, "cpu", torch.float32, 2, store, time.monotonic() - 1) is None


def test_a_model_that_fails_is_recorded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It ends red, not crashed: a part that crashes would begin again."""
    from bench.gpu import run as gpu
    from bench.gpu.measure import model as gpu_model

    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_model, "measure", fails)
    assert gpu.main(["model", "--device", "cpu", "--tiny", "--results", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    (record,) = json.loads(path.read_text())["left_out"]
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: no kernel image")
