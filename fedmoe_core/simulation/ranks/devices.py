"""Which device a rank computes on, and what cannot be: more ranks on a machine than it has GPUs."""

from __future__ import annotations

import os

import torch

from fedmoe_core.config.run_config import Config, usable_cores


def pick_device(config: Config) -> torch.device:
    """Choose the device of this process; of several ranks on a machine each takes its own GPU.

    Raises:
        ValueError: there are more ranks on this machine than GPUs, or they would share one.
    """
    name, local = config.device, int(os.environ.get("LOCAL_RANK", "0"))
    beside = _ranks_here(config)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and beside > 1:
        raise ValueError(
            f"device={name} would put all {beside} ranks of this machine on one GPU; set device=cuda, by which each "
            "takes its own"
        )
    if name != "cuda" or (beside == 1 and config.device == "cuda"):
        return torch.device(name)
    if local >= (found := torch.cuda.device_count()):
        raise ValueError(
            f"rank {os.environ.get('RANK', '0')} is number {local} on its machine, where torch sees "
            f"{found} GPU{'s' * (found != 1)} (numbers from 0); start at most {found} ranks there, or set device=cpu"
        )
    return torch.device(f"cuda:{local}")


def check_devices(config: Config) -> None:
    """Refuse what ``pick_device`` would refuse on some rank, before any of them is started.

    Raises:
        ValueError: more ranks than GPUs, or several on one.
    """
    found = torch.cuda.device_count()
    if config.device == "cuda" and config.ranks > found:
        raise ValueError(
            f"ranks={config.ranks} with device=cuda needs as many GPUs, and torch sees {found}; set ranks={found}"
            if found
            else f"device=cuda needs a GPU for each of ranks={config.ranks}, and torch sees none; set device=cpu"
        )
    pick_device(config)


def crowded(config: Config, device: torch.device) -> str:
    """Say that this machine has fewer cores than its ranks compute with; empty where it has enough."""
    ranks, cores = _ranks_here(config), usable_cores()
    if device.type != "cpu" or ranks == 1 or ranks * config.threads <= cores:
        return ""
    return (
        f"{ranks} ranks of {config.threads} thread{'s' * (config.threads != 1)} share the {cores} "
        f"core{'s' * (cores != 1)} of this machine; the result stays the same, it only takes longer"
    )


def _ranks_here(config: Config) -> int:
    """How many ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", config.ranks))
