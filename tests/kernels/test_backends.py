"""Which implementation serves a call: when Triton cannot, why, and that the surprise is told once."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from expert_cases import leaves, problem, run, solve

from fedmoe_kernels import backends

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A machine with one GPU whose compute capability the test may set; nothing is launched on it."""
    found = types.SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found.capability)
    monkeypatch.setattr(backends, "_gpu_lacks", backends._gpu_lacks.__wrapped__)
    monkeypatch.setattr(backends, "_missing_triton", lambda: None)
    return found


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.warn_once.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)])
def test_gpus_with_a_table_are_served(gpu: types.SimpleNamespace, capability: tuple[int, int]) -> None:
    gpu.capability = capability
    assert backends.can_run_triton(GPU) is None
    assert backends.can_run_triton(torch.device("cuda")) is None


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (13, 0)])
def test_other_gpus_are_named_with_their_capability(gpu: types.SimpleNamespace, capability: tuple[int, int]) -> None:
    gpu.capability = capability
    reason = backends.can_run_triton(GPU)
    assert "Some GPU" in reason
    assert f"{capability[0]}.{capability[1]}" in reason


@pytest.mark.usefixtures("gpu")
def test_rocm_and_a_missing_triton_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_missing_triton", lambda: "triton cannot be imported (gone)")
    assert "gone" in backends.can_run_triton(GPU)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in backends.can_run_triton(GPU)


def test_other_devices_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in backends.can_run_triton(CPU)
    assert "mps" in backends.can_run_triton(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in backends.can_run_triton(GPU)


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_kernels_on_a_gpu_and_says_once_when_it_cannot() -> None:
    assert backends.use_triton("auto", GPU, None, verb="moe_mlp")
    assert not backends.use_triton("cpu", GPU, None, verb="moe_mlp")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for reason in ("x_TH is float64", "x_TH is float64", "k=17"):
            assert not backends.use_triton("auto", GPU, reason, verb="moe_mlp")
    assert [str(w.message).split(": ")[1] for w in told] == ["x_TH is float64", "k=17"]
    assert all("moe_mlp runs in plain torch" in str(w.message) for w in told)


def test_cpu_tensors_are_no_surprise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backends.use_triton("auto", CPU, None, verb="moe_mlp")
        solve(problem(5, 8, 6, 3, 2))


def test_triton_insists_and_names_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = problem(5, 8, 6, 3, 2)
    with pytest.raises(ValueError, match=r"backend='triton' cannot serve moe_mlp: x_TH is float64"):
        run(p, leaves(p), backend="triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        run(p, leaves(p, torch.float32), backend="triton")
