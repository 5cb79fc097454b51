"""What two processes do with layers, for tests/core/layer/in_torch/test_distributed.py: RANK, FOLDER and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import RANKS, process_group
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fedmoe_core import MoE
from fedmoe_core.layer.lora import LayerLora

H, I, E, K, T = 64, 32, 8, 2, 12  # noqa: E741
SOME = [e < 6 for e in range(E)], [e in (1, 3, 4) for e in range(E)]


def adapted() -> MoE:
    layer = MoE(H, I, E, K)
    state = layer.global_state()
    lora = LayerLora.fresh(state.w_in, state.w_out, rank=4, scale=2.0, seed=0)
    layer.load_global(replace(state, lora=replace(lora, b_in=torch.randn(lora.b_in.shape) / 8)))
    return layer


KINDS: dict[str, Callable[[], MoE]] = {
    "all train": lambda: MoE(H, I, E, K),
    "some train": lambda: MoE(
        H, I, E, K, permitted=[e < 6 for e in range(E)], trainable=[e in (1, 3, 4) for e in range(E)]
    ),
    "none trains": lambda: MoE(H, I, E, K, trainable=[False] * E),
    "adapters": adapted,
}


def model_of(kind: str) -> nn.Sequential:
    """A dense layer before and after, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(H, H), KINDS[kind](), nn.Linear(H, H))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(100 * step + rank))


def train(model: nn.Module, batches: Callable[[int], Tensor], steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(batches(step)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer


def trained_alone(kind: str) -> dict[str, Tensor]:
    """What one process makes of all ranks' tokens."""
    model = model_of(kind)
    train(model, lambda step: torch.cat([batch(step, rank) for rank in range(RANKS)]))
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_close(found: Tensor, want: Tensor, name: str, within: float = 1e-4) -> None:
    assert (found - want).norm() <= within * want.norm(), f"{name}: {(found - want).norm() / want.norm()}"


def ddp(rank: int, folder: Path) -> None:
    for kind in KINDS:
        model = model_of(kind)
        train(DistributedDataParallel(model, broadcast_buffers=False), lambda step: batch(step, rank))
        for name, want in trained_alone(kind).items():
            assert_close(model.get_parameter(name).detach(), want, f"{kind}: {name}")
            others = [torch.empty_like(want) for _ in range(RANKS)]
            dist.all_gather(others, model.get_parameter(name).detach())
            assert torch.equal(*others), f"{kind}: the ranks differ in {name}"


def fsdp(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for kind in KINDS:
        model = model_of(kind)
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
        train(model, lambda step: batch(step, rank))
        for name, want in trained_alone(kind).items():
            assert_close(model.get_parameter(name).full_tensor().detach(), want, f"{kind}: {name}")


def mixed(rank: int, folder: Path) -> None:
    """FSDP2 with bfloat16 parameters in the forward, from a model made on meta; the masters stay float32."""
    mesh, policy = init_device_mesh("cpu", (RANKS,)), MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for kind in ("all train", "some train", "none trains"):
        with torch.device("meta"):
            model = model_of(kind)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                torch.manual_seed(rank)
                module.reset_parameters()
        before = {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}
        assert model(batch(0, rank)).dtype == torch.bfloat16
        train(model, lambda step: batch(step, rank))
        for name, parameter in model.named_parameters():
            now = parameter.full_tensor()
            assert now.dtype == torch.float32, f"{kind}: {name}"
            assert now.isfinite().all(), f"{kind}: {name}"
            assert not torch.equal(now, before[name]), f"{kind}: {name} did not move"


def resume(rank: int, folder: Path) -> None:
    """Save model and optimizer, load both into others, and go on: the same bits as without the stop."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for kind in KINDS:
        where = folder / kind.replace(" ", "-")

        def sharded(kind: str = kind) -> nn.Sequential:
            model = model_of(kind)
            for module in (*model, model):
                fully_shard(module, mesh=mesh)
            return model

        model = sharded()
        optimizer = train(model, lambda step: batch(step, rank))
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(parts, checkpoint_id=where)
        again = sharded()
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.mul_(0.5)
        resumed = torch.optim.AdamW(again.parameters(), lr=1e-2)
        blank = dict(zip(("model", "optimizer"), get_state_dict(again, resumed), strict=True))
        dcp.load(blank, checkpoint_id=where)
        set_state_dict(again, resumed, model_state_dict=blank["model"], optim_state_dict=blank["optimizer"])
        for one, optim in ((model, optimizer), (again, resumed)):
            optim.zero_grad()
            one(batch(7, rank)).square().mean().backward()
            optim.step()
        for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one.full_tensor(), other.full_tensor()), f"{kind}: {name}"


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    with process_group(rank, folder):
        for what in sys.argv[3:]:
            {f.__name__: f for f in (ddp, fsdp, mixed, resume)}[what](rank, folder)
            dist.barrier()
