"""Each rank takes a device of its own; ranks beyond the GPUs of a machine are refused, beyond its cores told."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import fedmoe_here

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation.ranks import devices
from fedmoe_core.simulation.ranks.devices import crowded, pick_device

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, on which four ranks run and this is rank 7 of 8, the last there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "7", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_rank_beyond_the_gpus_is_refused_by_name(gpus: pytest.MonkeyPatch, device: str) -> None:
    with pytest.raises(ValueError, match=r"rank 7 is number 3 on its machine, where torch sees 2 GPUs .* at most 2"):
        pick_device(Config(ranks=8, device=device))
    gpus.setenv("LOCAL_RANK", "1")
    assert pick_device(Config(ranks=8, device=device)) == torch.device("cuda:1")


def test_one_gpu_for_several_ranks_is_refused(gpus: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device=cuda:0 would put all 4 ranks of this machine on one GPU"):
        pick_device(Config(ranks=8, device="cuda:0"))
    gpus.setenv("LOCAL_WORLD_SIZE", "1")
    assert pick_device(Config(ranks=2, device="cuda:0")) == torch.device("cuda:0")


def test_a_rank_on_the_cpu_needs_no_gpu(gpus: pytest.MonkeyPatch) -> None:
    assert pick_device(Config(ranks=8, device="cpu")) == CPU
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Config(ranks=8)) == CPU


def test_more_ranks_than_cores_are_told_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_cores", lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert crowded(Config(ranks=4, threads=1), CPU) == ""
    assert crowded(Config(ranks=1, threads=8), CPU) == ""  # one process asked for it
    assert crowded(Config(ranks=8, threads=1), torch.device("cuda:0")) == ""
    assert crowded(Config(ranks=8, threads=1), CPU).startswith("8 ranks of 1 thread share the 4 cores of this machine")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the other six run elsewhere
    assert crowded(Config(ranks=8, threads=2), CPU) == ""
    assert crowded(Config(ranks=8, threads=3), CPU).startswith("2 ranks of 3 threads share the 4 cores")


@pytest.mark.parametrize(
    ("device", "gpus", "match"),
    [
        ("cuda", 0, "device=cuda needs a GPU for each of ranks=3, and torch sees none; set device=cpu"),
        ("cuda", 2, "ranks=3 with device=cuda needs as many GPUs, and torch sees 2; set ranks=2"),
        ("cuda:1", 2, "would put all 3 ranks of this machine on one GPU"),
    ],
)
def test_ranks_without_a_gpu_of_their_own_are_refused_before_they_start(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, match: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    done = fedmoe_here("simulate", "ranks=3", f"device={device}")
    assert done.returncode == 2
    assert match in done.stderr
