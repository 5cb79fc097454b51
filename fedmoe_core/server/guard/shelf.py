"""Accepted updates of one process, kept on disk until all of a round are there and read back in small pieces."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.blocks import square_sum
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.guard.votes import Vote

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # numpy knows no bfloat16


class Shelf:
    """Deltas of one process's accepted updates in one unnamed temporary file, and their votes in memory.

    The file lies where Python puts temporary files (TMPDIR) and goes with the process, however that ends. It takes the
    bytes of the deltas; no more than a piece of them is in memory.

    Args:
        specs: the summed tensors.
        settings: the number format.
    """

    def __init__(self, specs: Sequence[ParamSpec], settings: SumSettings) -> None:
        self._specs, self._settings = tuple(specs), settings
        self._file = tempfile.TemporaryFile(prefix="fedmoe-")  # noqa: SIM115 - open as long as the shelf
        self._size = 0
        self._places: dict[tuple[int, str], tuple[int, torch.dtype, dict[int, int]]] = {}
        self.votes: list[Vote] = []

    def put(self, update: ClientUpdate, plan: ExpertPlan, share: float) -> None:
        """Keep a checked update.

        Raises:
            OSError: the disk is full.
        """
        norms = {kind: np.zeros(plan.trainable_LE.shape) for kind in ("expert", "router")}
        dense = 0.0
        for spec in self._specs:
            if spec.key not in update.deltas:
                continue
            delta = update.deltas[spec.key]
            if spec.kind == "dense":
                rows, delta = [0], delta.unsqueeze(0)
                dense += square_sum(delta)
            else:
                rows = np.flatnonzero(plan.trainable_LE[spec.layer]).tolist()
                norms[spec.kind][spec.layer, rows] += [square_sum(row) for row in delta]
            self._write(update.client, spec.key, delta, rows)
        sends_dense = any(spec.kind == "dense" and spec.key in update.deltas for spec in self._specs)
        quantize = self._settings.quantize
        self.votes.append(
            Vote(
                client=update.client,
                weight=self._settings.quantize_one(update.sample_weight) * sends_dense,
                share=share,
                dense_norm=float(np.sqrt(dense)),
                expert_LE=quantize(update.expert_weight_LE),
                router_LE=quantize(update.router_weight_LE),
                expert_norm_LE=np.sqrt(norms["expert"]),
                router_norm_LE=np.sqrt(norms["router"]),
                sent_S=np.array([spec.key in update.deltas for spec in self._specs]),
            )
        )

    def _write(self, client: int, key: str, delta: Tensor, rows: Sequence[int]) -> None:
        data = delta.detach().cpu().to(WIDE.get(delta.dtype, delta.dtype)).contiguous()
        self._places[client, key] = (self._size, data.dtype, {row: place for place, row in enumerate(rows)})
        self._file.write(data.view(-1).numpy().tobytes())
        self._size += data.nbytes

    def read(self, client: int, spec: ParamSpec, piece: tuple[int, int, int], factor: float) -> Tensor:
        """Return numbers [start, stop) of a client's row of a tensor, as round(delta * factor * 2**scale_bits) int64.

        Args:
            client, spec: whose and of which tensor; it must have been put.
            piece: row (0 of a dense tensor), start and stop within the row.
            factor: what the deltas are multiplied by first.
        """
        row, start, stop = piece
        offset, dtype, places = self._places[client, spec.key]
        length = row_length(spec)
        self._file.flush()
        begin = offset + (places[row] * length + start) * dtype.itemsize
        data = bytearray(os.pread(self._file.fileno(), (stop - start) * dtype.itemsize, begin))
        if len(data) != (stop - start) * dtype.itemsize:
            raise OSError(f"the temporary file of this round's updates in {tempfile.gettempdir()} was cut short")
        values = torch.frombuffer(data, dtype=dtype).to(torch.float64)
        return values.mul_(factor * 2.0**self._settings.scale_bits).round_().to(torch.int64)


def row_length(spec: ParamSpec) -> int:
    """Return how many numbers a row of a tensor has; a dense tensor is one row."""
    shape: Sequence[int] = spec.shape if spec.kind == "dense" else spec.shape[1:]
    return int(np.prod(shape, dtype=np.int64))


def rows_of(spec: ParamSpec) -> int:
    """Return how many rows a tensor has: one for each expert; a dense tensor is one row."""
    return 1 if spec.kind == "dense" else spec.shape[0]
