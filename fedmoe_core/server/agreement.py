"""How far each client's change of an expert agrees with the sum of all: a second visit of the updates, on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.config.run_config import Config
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.guard.combine import Gather, alone
from fedmoe_core.server.guard.shelf import Shelf, row_length

BLOCK = 1 << 14  # values; torch adds up fewer than 2^15 on one thread, so the bits do not depend on their number


def agreements(
    shelf: Shelf,
    specs: Sequence[ParamSpec],
    numerators: Mapping[str, Tensor],
    *,
    shape_LE: tuple[int, int],
    unit: float,
    gather: Gather = alone,
) -> dict[int, np.ndarray]:
    """Return by client <delta, numerator> of every expert over all of its tensors, float64 (L, E); 0 without weight.

    Deltas are those of the exact sums, rounded to their step, and numerators are sums of integer weight x delta. Each
    product is made by the rank that holds the client, in one order, so that every placement gives the same bits.

    Args:
        shelf: this rank's accepted updates.
        specs: the summed tensors.
        numerators: int64 by key, over all ranks.
        shape_LE: (L, E).
        unit: what one unit of the sums is worth, 2**-scale_bits.
        gather: see ``Gather``; every rank calls this.
    """
    mine = []
    for vote in shelf.votes:
        dot_LE = np.zeros(shape_LE)
        for place, spec in enumerate(specs):
            if spec.kind != "expert" or not vote.sent_S[place]:
                continue
            sums_EN = numerators[spec.key].view(spec.shape[0], -1)
            for row in np.flatnonzero(vote.expert_LE[spec.layer]):
                for start in range(0, row_length(spec), BLOCK):
                    piece = (int(row), start, min(row_length(spec), start + BLOCK))
                    delta_N = shelf.read(vote.client, spec, piece, vote.share).to(torch.float64)
                    total_N = sums_EN[piece[0], piece[1] : piece[2]].cpu().to(torch.float64)
                    dot_LE[spec.layer, row] += float((delta_N * total_N).sum()) * unit**2
        mine.append(np.concatenate([np.array([vote.client], dtype=np.int64), dot_LE.ravel().view(np.int64)]))
    packed = torch.from_numpy(np.concatenate(mine) if mine else np.zeros(0, dtype=np.int64))
    found = {}
    for part in gather(packed):
        rows = part.numpy().reshape(-1, 1 + shape_LE[0] * shape_LE[1])
        for client, dots in zip(rows[:, 0].tolist(), rows[:, 1:], strict=True):
            found[client] = dots.copy().view(np.float64).reshape(shape_LE)
    return dict(sorted(found.items()))


def square_norms(
    specs: Sequence[ParamSpec], numerators: Mapping[str, Tensor], *, shape_LE: tuple[int, int], unit: float
) -> np.ndarray:
    """Return ||numerator||^2 of every expert over all of its tensors, float64 (L, E), as in ``agreements``."""
    found_LE = np.zeros(shape_LE)
    for spec in specs:
        if spec.kind != "expert":
            continue
        for row, sums_N in enumerate(numerators[spec.key].view(spec.shape[0], -1)):
            for part_n in sums_N.split(BLOCK):
                real_n = part_n.cpu().to(torch.float64)
                found_LE[spec.layer, row] += float((real_n * real_n).sum()) * unit**2
    return found_LE


def refuse_hidden(config: Config, *, sees_conflict: bool) -> None:
    """Refuse a system that compares updates with their sum where the server has no single updates, or another sum.

    Args:
        config: of the run.
        sees_conflict: as the attribute of the algorithm's class.

    Raises:
        ValueError: one of them.
    """
    if not sees_conflict:
        return
    if config.privacy.secure:
        raise ValueError(
            f"privacy.secure hides each client's change, and algorithm={config.algorithm!r} compares it with the sum "
            "of all; choose another system, or set privacy.secure=false"
        )
    if config.guard.rule != "none":
        raise ValueError(
            f"guard.rule={config.guard.rule} replaces the sum that algorithm={config.algorithm!r} compares each "
            "client's change with; set guard.rule=none"
        )
