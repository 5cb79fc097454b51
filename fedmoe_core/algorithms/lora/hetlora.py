"""HetLoRA (arXiv 2401.06432): adapters of a rank for each client, truncated, padded and pruned.

The paper was not opened here: formulas are from notes [N], readings ours [E].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedmoe_core.algorithms.base import EachAlone, NextModel
from fedmoe_core.algorithms.largest_fit import UNCOUNTED, resident_plan
from fedmoe_core.algorithms.lora.factors import kept_ranks
from fedmoe_core.algorithms.lora.rank_tail import RankProbe, TailLoss, padded, tail_tables, without_missing_ranks
from fedmoe_core.config.systems import Equation, System
from fedmoe_core.messages.plan import ExpertPlan, Extras
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate, Weights
from fedmoe_core.server.means import Sums, dense_mean, expert_mean, gate_mean
from fedmoe_core.server.state import Population, ServerState


@dataclass(frozen=True)
class HetLora(EachAlone):
    """The server's adapters cut to each client's rank, zero-padded on return, averaged by the norm of their product."""

    card: ClassVar[System] = System(
        name="hetlora",
        title="HetLoRA",
        paper="Cho et al., HetLoRA, arXiv 2401.06432",
        equations=(
            Equation("truncation", "N", "client k gets the first r_k ranks of the server's A and B"),
            Equation("aggregation", "N", "A = sum_k w_k pad(A_k), B likewise; a rank that a client lacks votes zero"),
            Equation("weights", "N", "w_k = ||B_k A_k||_F over its sum among clients"),
            Equation("weights, by expert", "E", "one weight for each expert, over both of its matrices"),
            Equation("regulariser", "N", "loss + lambda ||B_k[:, gamma r:]||_F ||A_k[gamma r:, :]||_F, summed"),
            Equation("self-pruning", "N", "r_k falls to gamma r_k where that product shrank in local training"),
            Equation("r_k", "E", "the largest rank whose local steps the client's budget pays"),
            Equation("router", "E", "trained and averaged by |D_k|"),
        ),
        approximated=(*UNCOUNTED, "all adapters of a client share one rank, and are pruned together"),
    )

    adapters = "shared"
    wishes: ClassVar[tuple[type, ...]] = (RankProbe, TailLoss)

    def plan_client(self, state: ServerState, client: int) -> ExpertPlan:
        """Plan all experts at rank r_k, or at what self-pruning has left of it."""
        chosen = self.population.config.lora
        left = int(state.memory.get(f"rank/{client}", torch.tensor(chosen.rank)))

        def extras_of(population: Population, rank: int) -> Extras:
            rank = min(rank, left)
            keep = kept_ranks(rank, chosen.keep_share)
            tail = keep < rank and chosen.tail > 0
            aux = TailLoss(chosen.tail, keep, tail_tables(population.costs_at(rank))) if tail else None
            return Extras(lora_rank=rank, after=RankProbe(keep), aux=aux)

        return resident_plan(self.population, state, client, chosen.rank, extras_of)

    def client(self, plan: ExpertPlan, result: LocalResult) -> Weights:
        """Weigh padded adapters by the norm of their product; report the rank that is left for the next round."""
        samples, chosen = self.population.sample_weight(plan.client), self.population.config.lora
        assert plan.extras.lora_rank is not None
        # Over the norm of the frozen expert, which is the same for all clients, so that it fits a weight's range.
        norm_LE = (result.probed["norm_LE"] / result.probed["base_LE"]).clamp(max=1.0).numpy()
        shrunk = float(result.probed["tail_after"]) < float(result.probed["tail_before"])
        left = kept_ranks(plan.extras.lora_rank, chosen.keep_share) if shrunk else plan.extras.lora_rank
        return Weights(
            experts_LE=norm_LE * plan.trainable_LE,
            routers_LE=samples * plan.trainable_LE,
            gate=samples,
            deltas=padded(result.deltas, chosen.rank),
            private={"ranks": torch.tensor([plan.extras.lora_rank, left])},
            metrics={"rank": plan.extras.lora_rank, "pruned_to": left},
        )

    def apply(self, state: ServerState, sums: Sums, updates: Sequence[ClientUpdate]) -> NextModel:
        """Apply the weighted means of zero-padded adapters; an expert whose product is zero everywhere stays."""
        ranked = {update.client: update for update in updates if update.private}
        votes = [(int(u.private["ranks"][0]), u.expert_weight_LE) for u in ranked.values()]
        experts = without_missing_ranks(expert_mean(sums, state.params), state.params, sums, votes)
        left = {f"rank/{client}": update.private["ranks"][1] for client, update in ranked.items()}
        others = {**gate_mean(sums, state.params, "fedavg"), **dense_mean(sums, state.params)}
        return {**experts, **others}, {**state.memory, **left}
