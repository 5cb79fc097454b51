"""What a start has to do with the run directory: begin, or go on with what an earlier attempt of this start left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fedmoe_core.config.run_config import Config
from fedmoe_core.simulation import launch
from fedmoe_core.simulation.directory.claim import CHECKPOINT, JSON_NAME, read_facts
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.process_group import Ranks

Start = Literal["begin", "begin again", "go on"]


def kind_of_start(ranks: Ranks, config: Config, out: Path, *, sources: Callable[[], Identity], force: bool) -> Start:
    """Decide on rank 0, for all ranks, what a launcher's restart of ``simulate`` does.

    ``begin`` as any start does; ``begin again`` where an earlier attempt left this very run without a checkpoint; ``go
    on`` where it left one. With ``force``, a run of other code or data in ``out`` is not this run's.
    """
    if not launch.restarted():
        return "begin"
    found: Start = "begin"
    with ranks.together("looking for what an earlier attempt left"):
        if ranks.leads:
            found = _what_is_left(config, out, sources, force=force)
    decided: Start = ranks.gather(found)[0]
    return decided


def _what_is_left(config: Config, out: Path, sources: Callable[[], Identity], *, force: bool) -> Start:
    facts = read_facts(out)
    if facts is None or config.diff(Config.load(out / "config.toml")):
        return "begin"
    if force and Identity.read(facts) != sources():
        return "begin"
    return "go on" if (out / CHECKPOINT / JSON_NAME).is_file() else "begin again"


def share(ranks: Ranks, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank, bit for bit, on the CPU; other nodes need not see its files.

    Raises:
        launch.PeerLostError: a rank was lost.
    """
    if ranks.world == 1:
        return tensors
    named = [[key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for key, tensor in tensors.items()]
    found = {}
    for key, kind, shape in ranks.gather(named)[0]:
        whole = tensors[key].contiguous() if ranks.leads else torch.empty(shape, dtype=getattr(torch, kind))
        # As bytes: no backend knows every dtype.
        sent = whole.reshape(-1).view(torch.uint8).to(ranks.device)
        if sent.numel():
            with ranks.meeting():
                dist.broadcast(sent, 0)
        found[key] = sent.cpu().view(whole.dtype).reshape(whole.shape)
    return found
