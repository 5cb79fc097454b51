"""All updates of a round become numerators under a rule, piece by piece, so that memory does not grow with clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedmoe_core.model.spec import Kind, ParamSpec
from fedmoe_core.server.guard import rules
from fedmoe_core.server.guard.bounds import group_of, usual_norms
from fedmoe_core.server.guard.settings import FEWEST, Guard
from fedmoe_core.server.guard.shelf import Shelf, row_length, rows_of
from fedmoe_core.server.guard.votes import Vote, pack_votes, unpack_votes

# Numbers of all voters together that are compared at once: 16 MB of int64, and a few times that while they are sorted.
BLOCK = 1 << 21

Gather = Callable[[Tensor], list[Tensor]]  # a one-dimensional tensor of any length; those of all ranks, in rank order
Part = tuple[Kind, int, int]  # and layer and row; the dense tensors are one row
Piece = tuple[int, int, int]  # row, start, stop


@dataclass(frozen=True)
class Told:
    """What the guard did in a round. A part: an expert's tensors, a router row, or all dense tensors.

    Attributes:
        rule: its name.
        bounded: by client, how many of its parts were scaled down to the norm bound.
        left_out: by client, on how many parts krum did not choose it.
        few: parts with fewer voters than the rule needs.
        below_quorum: parts that kept their bits for want of voters.
        history_RG: medians of norms, for the next round's bound; None where no rule needs them.
    """

    rule: str = "none"
    bounded: Mapping[int, int] = field(default_factory=dict)
    left_out: Mapping[int, int] = field(default_factory=dict)
    few: int = 0
    below_quorum: int = 0
    history_RG: np.ndarray | None = None


def alone(values: Tensor) -> list[Tensor]:
    """Gather of a run of one process."""
    return [values]


@dataclass(frozen=True)
class Ballot:
    """All votes of a round, on every rank, and the numbers of this rank's clients.

    Attributes:
        votes: of all ranks, by ascending client.
        rank_of: by client.
        shelf: what this rank's clients sent.
        factors: by client and part, what its deltas are multiplied by.
        gather: brings the numbers of all ranks.
    """

    votes: tuple[Vote, ...]
    rank_of: Mapping[int, int]
    shelf: Shelf
    factors: Mapping[tuple[int, Part], float]
    gather: Gather

    def voters(self, spec: ParamSpec, place: int, row: int) -> list[Vote]:
        """Return who votes on a row of a tensor, the ``place``-th of the summed ones, and has sent it."""
        return [vote for vote in self.votes if vote.sent_S[place] and vote.weight_of(spec.kind, spec.layer, row)]

    def values(
        self, spec: ParamSpec, place: int, pieces: Sequence[Piece]
    ) -> Iterator[tuple[Piece, list[Vote], Tensor]]:
        """Yield each piece with its voters and what they say, int64 (voters, stop - start); every rank calls it."""
        own = {vote.client for vote in self.shelf.votes}
        voters = [self.voters(spec, place, row) for row, _, _ in pieces]
        mine = [torch.zeros(0, dtype=torch.int64)]
        for piece, of_piece in zip(pieces, voters, strict=True):
            for vote in of_piece:
                if vote.client in own:
                    factor = self.factors[vote.client, (spec.kind, spec.layer, piece[0])]
                    mine.append(self.shelf.read(vote.client, spec, piece, factor))
        parts = self.gather(torch.cat(mine))
        taken = [0] * len(parts)
        for piece, of_piece in zip(pieces, voters, strict=True):
            length, rows = piece[2] - piece[1], []
            for rank in (self.rank_of[vote.client] for vote in of_piece):
                rows.append(parts[rank][taken[rank] : taken[rank] + length])
                taken[rank] += length
            yield piece, of_piece, torch.stack(rows)

    def piece_groups(self, spec: ParamSpec, place: int) -> Iterator[list[Piece]]:
        """Cut a tensor's rows so that the numbers of all voters of a group of pieces are about ``BLOCK``."""
        group, held = list[Piece](), 0
        for row in range(rows_of(spec)):
            count, length = len(self.voters(spec, place, row)), row_length(spec)
            step = max(1, BLOCK // max(1, count))
            for start in range(0, length if count else 0, step):
                group.append((row, start, min(length, start + step)))
                held += count * (group[-1][2] - start)
                if held >= BLOCK:
                    yield group
                    group, held = [], 0
        if group:
            yield group


def combine(
    shelf: Shelf,
    guard: Guard,
    specs: Sequence[ParamSpec],
    numerators: Mapping[str, Tensor],
    *,
    layers: int,
    unit: float,
    history_RG: np.ndarray | None = None,
    gather: Gather = alone,
) -> tuple[Told, dict[Part, int]]:
    """Fill the numerators under the guard's rule; the same bits on every rank and for every order of clients.

    Args:
        shelf: this rank's updates.
        guard: its rule is not "none".
        specs: the summed tensors.
        numerators: int64 by key, zero; changed in place.
        layers: MoE layers.
        unit: what one unit of the sums is worth, 2**-scale_bits.
        history_RG: as ``usual_norms``.
        gather: see ``Gather``; every rank calls ``combine``.

    Returns:
        What it did, and the denominators that are not the sum of all voters' weights, by part.
    """
    experts = max((spec.shape[0] for spec in specs if spec.kind != "dense"), default=0)
    votes: list[Vote] = []
    rank_of = {}
    for rank, packed in enumerate(gather(pack_votes(shelf.votes))):
        for vote in unpack_votes(packed, layers, experts, len(specs)):
            votes.append(vote)
            rank_of[vote.client] = rank
    votes.sort(key=lambda vote: vote.client)
    parts = dict.fromkeys((spec.kind, spec.layer, row) for spec in specs for row in range(rows_of(spec)))
    voters = {part: [vote for vote in votes if vote.weight_of(*part)] for part in parts}
    usual_G, history_RG = usual_norms(votes, history_RG, layers)
    bounded, factors = Counter[int](), {}
    for part, of_part in voters.items():
        limit = guard.factor * usual_G[group_of(part[0], part[1], layers)]
        for vote in of_part:
            norm = vote.norm_of(*part)
            factors[vote.client, part] = vote.share * (limit / norm if norm > limit else 1.0)
            bounded[vote.client] += int(norm > limit)
    ballot = Ballot(tuple(votes), rank_of, shelf, factors, gather)
    few = {part for part, of_part in voters.items() if 0 < len(of_part) < FEWEST[guard.rule]}
    kept = few if guard.few == "keep" else set()
    chosen = _chosen(ballot, guard, specs, voters, few, unit) if guard.rule == "krum" else {}
    for place, spec in enumerate(specs):
        rows = numerators[spec.key].view(rows_of(spec), -1)
        for pieces in ballot.piece_groups(spec, place):
            for (row, start, stop), of_piece, values_NW in ballot.values(spec, place, pieces):
                part = (spec.kind, spec.layer, row)
                if part in kept:
                    continue
                weights = [vote.weight_of(*part) for vote in of_piece]
                places = [n for n, vote in enumerate(of_piece) if vote.client in chosen.get(part, {vote.client})]
                if part in few or guard.rule in ("norm", "krum"):
                    found = rules.weighted_sum(values_NW[places], [weights[n] for n in places])
                elif guard.rule == "median":
                    found = rules.median(values_NW, sum(weights))
                else:
                    found = rules.trimmed_mean(values_NW, guard.hostile_of(len(of_piece)), sum(weights))
                rows[row, start:stop] = found.to(rows.device)
    dens: dict[Part, int] = dict.fromkeys(kept, 0)
    dens |= {
        part: sum(v.weight_of(*part) for v in voters[part] if v.client in of_part) for part, of_part in chosen.items()
    }
    left_out = Counter(v.client for part, of_part in chosen.items() for v in voters[part] if v.client not in of_part)
    told = Told(guard.rule, dict(+bounded), dict(left_out), len(few), 0, history_RG)
    return told, dens


def _chosen(
    ballot: Ballot,
    guard: Guard,
    specs: Sequence[ParamSpec],
    voters: Mapping[Part, Sequence[Vote]],
    few: set[Part],
    unit: float,
) -> dict[Part, set[int]]:
    """The clients that krum chooses for each part with enough voters, by the distances of all its tensors together."""
    distances: dict[Part, Tensor] = {}
    for place, spec in enumerate(specs):
        for pieces in ballot.piece_groups(spec, place):
            for (row, _, _), of_piece, values_NW in ballot.values(spec, place, pieces):
                part = (spec.kind, spec.layer, row)
                if part in few or len(of_piece) < len(voters[part]):
                    continue
                found_NN = rules.square_distances(values_NW, unit)
                distances[part] = distances[part] + found_NN if part in distances else found_NN
    return {
        part: {voters[part][n].client for n in rules.krum_chosen(of_part, guard.hostile_of(len(of_part)))}
        for part, of_part in distances.items()
    }
