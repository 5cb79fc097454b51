"""Rows of tensors dealt to clients: the data of a run that trains a plain torch model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.data.partition import counts, partition

Rows = tuple[Tensor, ...]  # tensors of one height: row n of each belongs to sample n


@dataclass(frozen=True, eq=False)
class RowData:
    """All training rows, who owns which of them, and the rows that judge the model.

    Attributes:
        tensors: training rows of all clients.
        rows_C: the owned places in ``tensors`` of each client, int64, ascending.
        test: held-out rows.
        names_D, counts_CD: classes and how many rows of each a client owns; one class "rows" where there are no labels.
        partition: how the rows were dealt; "given" where each client came with its own.
    """

    tensors: Rows
    rows_C: tuple[Tensor, ...]
    test: Rows
    names_D: tuple[str, ...]
    counts_CD: np.ndarray
    partition: str

    def to(self, device: torch.device) -> RowData:
        """Return the same data with rows on ``device``; who owns which stays where it is."""
        tensors, test = (tuple(tensor.to(device) for tensor in rows) for rows in (self.tensors, self.test))
        return RowData(tensors, self.rows_C, test, self.names_D, self.counts_CD, self.partition)

    def batch(self, places: Tensor) -> Rows:
        """Return the training rows at ``places``, in the shape of ``places``."""
        places = places.to(self.tensors[0].device)
        return tuple(tensor[places] for tensor in self.tensors)


def deal_rows(train: Rows | Sequence[Rows], test: Rows, *, clients: int, scheme: str, seed: int) -> RowData:
    """Deal rows to clients, or take what each client came with.

    Args:
        train: rows of all clients together; or one entry for each client.
        test: held-out rows.
        clients: C.
        scheme: as ``Config.partition``. The last tensor is the label where it holds whole numbers, one a row; "auto" is
            then dirichlet:0.5, else iid. Of no meaning where each client came with its rows.
        seed: of the draw.

    Raises:
        ValueError: tensors of unequal heights, no rows, another number of clients, or labels that a scheme lacks.
    """
    whole = bool(train) and all(isinstance(part, Tensor) for part in train)
    parts: list[Rows] = [_checked("train", tuple(train))] if whole else [_checked("train", tuple(p)) for p in train]  # type: ignore[arg-type]
    test = _checked("test", tuple(test))
    if not parts:
        raise ValueError("train holds nothing; give for example train=(inputs, labels)")
    if not whole and len(parts) != clients:
        raise ValueError(f"train has the rows of {len(parts)} clients and clients={clients}; set clients={len(parts)}")
    tensors = parts[0] if whole else tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    height = len(tensors[0])
    labels_N = _labels(tensors[-1])
    groups_N = np.zeros(height, dtype=np.int64) if labels_N is None else labels_N
    if whole:
        dealt = ("iid" if labels_N is None else "dirichlet:0.5") if scheme == "auto" else scheme
        if labels_N is None and dealt != "iid":
            raise ValueError(f"partition={scheme} deals by label, and the last tensor holds none; set partition=iid")
        owner_N = partition(groups_N, clients=clients, scheme=dealt, seed=seed)
    else:
        dealt = "given"
        owner_N = np.repeat(np.arange(clients), [len(part[0]) for part in parts])
    names, groups_N = np.unique(groups_N, return_inverse=True)
    counts_CD = counts(owner_N, groups_N, (clients, len(names)), np.ones(height, dtype=np.int64))
    order = np.argsort(owner_N, kind="stable")
    rows_C = torch.from_numpy(order).split(np.bincount(owner_N, minlength=clients).tolist())
    names_D = ("rows",) if labels_N is None else tuple(f"class {name}" for name in names)
    return RowData(tensors, rows_C, test, names_D, counts_CD, dealt)


def rows_digest(train: Rows | Sequence[Rows], test: Rows) -> str:
    """Return the hex sha256 of all rows, and of whose they are where each client came with its own."""
    digest = sha256()
    for part in (train, test):
        for tensor in (tensor for rows in part for tensor in ([rows] if isinstance(rows, Tensor) else rows)):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def epoch_steps(rows: int, batch_size: int, epochs: int) -> int:
    """Count the steps of so many passes over so many rows; the last batch of a pass may be smaller."""
    return epochs * -(-rows // batch_size)


def rows_of_steps(rows: int, steps: int, *, batch_size: int, by_epoch: bool) -> int:
    """Count the rows that so many steps of ``draw_places`` read."""
    if not by_epoch:
        return steps * batch_size
    passes, left = divmod(steps, epoch_steps(rows, batch_size, 1))
    return passes * rows + left * batch_size


def draw_places(
    rows: Tensor, rng_key: tuple[int, int, int], *, steps: int, batch_size: int, by_epoch: bool
) -> Iterator[Tensor]:
    """Draw the places of a client's batches in one round: random order, each row once before any comes twice.

    Args:
        rows: the client's places, (n,).
        rng_key: the run's seed, the round, the client.
        steps: batches.
        batch_size: rows of a batch.
        by_epoch: each pass ends with a smaller batch where n is not a multiple; otherwise passes run on end to end.
    """
    seed, round, client = rng_key
    rng = counter_rng(seed, "client batches", round, client)
    size = len(rows)
    if by_epoch:
        per_pass = epoch_steps(size, batch_size, 1)
        for done in range(0, steps, per_pass):
            order = rows[torch.from_numpy(rng.permutation(size))]
            yield from order.split(batch_size)[: steps - done]
        return
    passes = -(-steps * batch_size // size)
    order = rows[torch.from_numpy(np.concatenate([rng.permutation(size) for _ in range(passes)]))]
    yield from order[: steps * batch_size].split(batch_size)


def _checked(name: str, rows: Rows) -> Rows:
    if not rows or not all(isinstance(tensor, Tensor) and tensor.dim() for tensor in rows):
        raise ValueError(f"{name} must be tensors with a row for each sample; give for example {name}=(inputs, labels)")
    heights = [len(tensor) for tensor in rows]
    if len(set(heights)) > 1 or not heights[0]:
        raise ValueError(f"the tensors of {name} have {heights} rows; give each of them the same, and at least one")
    return rows


def _labels(last: Tensor) -> np.ndarray | None:
    """Labels of the rows, (N,); None where the last tensor does not look like labels."""
    if last.dim() != 1 or last.is_floating_point() or last.is_complex():
        return None
    return last.cpu().numpy().astype(np.int64)
